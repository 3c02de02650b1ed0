"""Local reconstruction: the layers beside a run learn, nothing else changes, and the stream comes nearer to the dense model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.errors import Refusal
from components.lib.training.journal import Silent
from components.lib.training.reconstruct import Recorded, Site, network_of, recorded, sites
from components.lib.transfers import why_not_fitted
from components.lib.transfers.reconstruct import Reconstruct
from components.lib.transfers.ridge import Ridge
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.gates import blocks, bypassed, watched
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import NO_CHANNELS, Channels, Selection
from tests.components.lib.transformer.zoo import (
    MODERN,
    NARROWABLE,
    SPECIMENS,
    VOCABULARY,
    Specimen,
    draw_channels,
    release,
)

BY_NAME = {specimen.name: specimen for specimen in (*SPECIMENS, *MODERN, *NARROWABLE)}
EVERY_KIND = [BY_NAME[name] for name in ("llama", "gemma2", "mixtral", "opt", "gpt2")]
WINDOWS = torch.randint(3, VOCABULARY, (16, 16), generator=torch.Generator().manual_seed(2))
REMOVED = (2, 3)


def without(*layers: int, channels: Channels = NO_CHANNELS) -> Selection:
    return Selection(method="hand", removed=layers, channels=channels)


def behind(model: PreTrainedModel, layer: int, removed: tuple[int, ...] = ()) -> Tensor:
    """The stream behind a layer of the model without some: (windows, length − 1, hidden)."""
    with torch.no_grad(), bypassed(model, removed), watched(model, [layer]) as seen:
        model(input_ids=WINDOWS)
        return seen[layer][1][:, 1:].double()


@pytest.mark.parametrize("specimen", EVERY_KIND, ids=str)
def test_the_stream_behind_the_run_comes_nearer_and_only_the_layers_beside_it_change(specimen: Specimen) -> None:
    model = specimen.model(6)
    target = behind(model, 3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    asked = {name: weight.requires_grad for name, weight in model.named_parameters()}
    error = (behind(model, 1, REMOVED) - target).norm()
    transfer = Reconstruct(before=1, after=1, follow=1, steps=30, learning_rate=0.01)
    transfer.apply(model, WINDOWS, without(*REMOVED), journal=Silent())
    assert (behind(model, 1, REMOVED) - target).norm() < 0.9 * error
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    beside = {
        name
        for layer in (1, 4)
        for name, weight in model.named_parameters()
        if any(weight is own for own in blocks(model)[layer].parameters())
    }
    assert changed
    assert changed <= beside
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == asked
    assert not model.training


def test_comes_nearer_than_ridge_regression_alone() -> None:
    target = behind(BY_NAME["llama"].model(6), 3)
    errors = {}
    for transfer in (Ridge(), Reconstruct(before=2, steps=60, learning_rate=0.01)):
        model = BY_NAME["llama"].model(6)
        transfer.apply(model, WINDOWS, without(*REMOVED), journal=Silent())
        errors[transfer.name] = (behind(model, 1, REMOVED) - target).norm().item()
    assert errors["reconstruct"] < errors["ridge"]


def error_of_network(model: PreTrainedModel, dense: Recorded, layer: int, channels: Channels) -> Tensor:
    """How far a layer's network without the channels is from what the dense one gives on the same inputs."""
    network = network_of(model, layer)
    assert network is not None
    with torch.no_grad(), narrowed(model, channels):
        return (network(dense.inputs) - dense.outputs).norm()


WITH_NETWORK = [specimen for specimen in NARROWABLE if network_of(specimen.model(2), 1) is not None]


@pytest.mark.parametrize("specimen", WITH_NETWORK, ids=str)
def test_a_network_that_loses_channels_comes_nearer_to_the_dense_one_on_its_inputs(specimen: Specimen) -> None:
    model, fitted = (specimen.model(2) for _ in range(2))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    channels = draw_channels(model, ("ffn",))
    dense = [of_layer for _, of_layer in recorded(model, WINDOWS)]
    Reconstruct(steps=40, learning_rate=0.01).apply(model, WINDOWS, without(channels=channels), journal=Silent())
    if not why_not_fitted(FAMILIES[specimen.model_type], fitted.config.to_dict()):
        Ridge().apply(fitted, WINDOWS, without(channels=channels), journal=Silent())
    networks = set()
    for layer, of_layer in enumerate(dense):
        if of_layer is None:  # Falcon's first two tensors, BLOOM's residual
            continue
        error = error_of_network(model, of_layer, layer, channels)
        assert error < error_of_network(fitted, of_layer, layer, channels)
        networks |= {id(weight) for weight in of_layer.network.parameters()}
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert {id(model.get_parameter(name)) for name in changed} == networks


def test_the_channels_that_are_removed_keep_their_weights() -> None:
    model = BY_NAME["llama"].model(2)
    before = model.state_dict()["model.layers.1.mlp.up_proj.weight"].clone()
    channels = draw_channels(model, ("ffn",))
    Reconstruct(steps=2).apply(model, WINDOWS, without(channels=channels), journal=Silent())
    same = (model.state_dict()["model.layers.1.mlp.up_proj.weight"] == before).all(1)
    assert same.nonzero().flatten().tolist() == list(channels.ffn[1])


def test_what_a_network_learns_does_not_depend_on_the_layers_below() -> None:
    models = [BY_NAME["llama"].model(3) for _ in range(2)]
    rows = draw_channels(models[0], ("ffn",)).ffn
    for model, ffn in zip(models, (rows, ((), (), rows[2])), strict=True):
        Reconstruct(steps=3).apply(model, WINDOWS, without(channels=Channels(ffn=ffn)), journal=Silent())
    first, second = (blocks(model)[2].state_dict() for model in models)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_a_family_without_a_module_for_the_network_is_fitted_by_ridge_regression_alone(name: str) -> None:
    models = [BY_NAME[name].model(2) for _ in range(2)]
    selection = without(channels=draw_channels(models[0], ("ffn", "heads")))
    for model, transfer in zip(models, (Reconstruct(), Ridge()), strict=True):
        transfer.apply(model, WINDOWS, selection, journal=Silent())
    first, second = (model.state_dict() for model in models)
    assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)


def test_a_layer_that_is_removed_learns_nothing() -> None:
    dense, model = (BY_NAME["llama"].model(6) for _ in range(2))
    rows = draw_channels(model, ("ffn",)).ffn
    channels = Channels(ffn=tuple(() if layer in REMOVED else row for layer, row in enumerate(rows)))
    Reconstruct(steps=2).apply(model, WINDOWS, without(*REMOVED, channels=channels), journal=Silent())
    for layer, (before, after) in enumerate(zip(blocks(dense), blocks(model), strict=True)):
        same = all(torch.equal(a, b) for a, b in zip(before.mlp.parameters(), after.mlp.parameters(), strict=True))
        assert same == (layer in REMOVED)


def test_gives_the_same_weights_again_in_the_type_of_the_release() -> None:
    first, second = (BY_NAME["llama"].model(6).bfloat16() for _ in range(2))
    for model in (first, second):
        Reconstruct(steps=3).apply(model, WINDOWS, without(1, 4), journal=Silent())
    assert all(weight.dtype == torch.bfloat16 for weight in first.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_its_progress_and_losses_are_those_of_all_runs() -> None:
    class Seen(Silent):
        def __init__(self) -> None:
            self.parts: list[tuple[int, int]] = []
            self.curves: set[str] = set()

        def metrics(self, values: object, step: int) -> None:
            self.curves |= set(values)  # type: ignore[call-overload]

        def progress(self, done: int, total: int, **shown: float) -> None:
            self.parts.append((done, total))

    seen = Seen()
    model = BY_NAME["mixtral"].model(6)  # not fitted by ridge regression
    Reconstruct(steps=2).apply(model, WINDOWS, without(1, 4), journal=seen)
    assert seen.parts == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen.curves == {"reconstruction_1", "reconstruction_2"}


class TestSites:
    def test_the_layer_before_a_run_takes_the_stream_behind_it(self) -> None:
        (site,) = sites([3, 4], 10, before=2, after=1, follow=2)
        assert site == Site(trained=(1, 2, 5), targets={2: 4, 5: 5, 6: 6, 7: 7})

    def test_ends_before_the_next_run(self) -> None:
        first, second = sites([3, 6], 10, before=1, after=2, follow=2)
        assert first == Site(trained=(2, 4, 5), targets={2: 3, 4: 4, 5: 5})
        assert second == Site(trained=(5, 7, 8), targets={5: 6, 7: 7, 8: 8, 9: 9})

    def test_reaches_past_a_run_that_is_removed_before(self) -> None:
        _, second = sites([2, 4], 8, before=2, after=0, follow=0)
        assert second == Site(trained=(1, 3), targets={3: 4})

    def test_of_a_run_at_layer_0_trains_what_stands_behind_it(self) -> None:
        assert sites([0, 1], 6, before=2, after=1, follow=1) == [Site(trained=(2,), targets={2: 2, 3: 3})]

    def test_of_a_run_at_the_end_trains_what_stands_before_it(self) -> None:
        assert sites([4, 5], 6, before=1, after=1, follow=1) == [Site(trained=(3,), targets={3: 5})]


def test_refuses_settings_by_which_no_layer_learns(tmp_path: Path) -> None:
    folder = release(BY_NAME["llama"].model(6), tmp_path / "release")
    with pytest.raises(Refusal, match="no layer learns"):
        Reconstruct(before=0, after=0).check(PrunableCheckpoint.open(folder))
