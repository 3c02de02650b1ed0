"""Ridge, ReplaceMe's matrix and LaCo's merge: each equals its equation, lowers the error, and leaves everything else alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.errors import Refusal
from components.lib.training.journal import Silent
from components.lib.training.refit import fit_seams, runs_of, seen_by, streams, writer_of
from components.lib.transfers import Transfer
from components.lib.transfers.linear import Linear
from components.lib.transfers.merge import Merge
from components.lib.transfers.ridge import Ridge
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.export import save_model, verify_cut
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.gates import skipped, watched
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import NO_CHANNELS, Channels, Selection
from components.lib.transformer.surgery import cut_checkpoint
from tests.components.lib.transformer.zoo import (
    MODERN,
    NARROWABLE,
    SPECIMENS,
    VOCABULARY,
    Specimen,
    draw_channels,
    logits,
    release,
)

BY_NAME = {specimen.name: specimen for specimen in (*SPECIMENS, *MODERN, *NARROWABLE)}
LAYERS = 6
WINDOWS = torch.randint(3, VOCABULARY, (24, 16), generator=torch.Generator().manual_seed(2))
FITTED = [
    specimen
    for specimen in (*NARROWABLE, *MODERN)
    if (layout := FAMILIES[specimen.model_type].layout) and not layout.norms_after(specimen.model().config.to_dict())
]
"""The specimens whose last projections write the stream."""


def without(*layers: int, channels: Channels = NO_CHANNELS) -> Selection:
    return Selection(method="hand", removed=layers, channels=channels)


def behind(model: PreTrainedModel, layer: int, selection: Selection) -> Tensor:
    """The stream behind a layer of the model without the selection, first tokens left out: (tokens, hidden)."""
    with skipped(model, selection.removed), narrowed(model, selection.channels), watched(model, [layer]) as seen:
        with torch.no_grad():
            model(input_ids=WINDOWS)
        return seen[layer][1][:, 1:].flatten(0, 1).double()


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def changed(model: PreTrainedModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


class TestRidge:
    @pytest.mark.parametrize("specimen", FITTED, ids=str)
    def test_of_layers_lowers_the_error_of_the_stream_and_changes_one_projection(self, specimen: Specimen) -> None:
        model, selection = specimen.model(LAYERS), without(2, 3)
        target = behind(model, 3, without())
        error = (behind(model, 1, selection) - target).square().sum()
        before = state(model)
        Ridge(strength=0.01).apply(model, WINDOWS, selection, journal=Silent())
        assert (behind(model, 1, selection) - target).square().sum() < 0.8 * error
        own = {f"{name}.{kind}" for name, module in model.named_modules() for kind in ("weight", "bias")
               if module is writer_of(model, 1, "ffn").module}  # fmt: skip
        assert changed(model, before)
        assert changed(model, before) <= own

    @pytest.mark.parametrize(
        ("name", "scale"), [("llama", 1.0), ("granite", 0.5), ("gpt2", 1.0), ("llama-biased", 1.0)]
    )
    def test_of_layers_is_the_least_squares_solution(self, name: str, scale: float) -> None:
        model = BY_NAME[name].model(LAYERS)
        writer = writer_of(model, 1, "ffn")
        with seen_by(writer.module, "input") as inputs, torch.no_grad():
            model(input_ids=WINDOWS)
            h = inputs[0][:, 1:].flatten(0, 1).double().numpy()
        missing = (behind(model, 3, without()) - behind(model, 1, without())).numpy() / scale
        weight, bias = writer.weight.double().numpy().copy(), writer.bias
        if bias is not None:
            bias = bias.double().clone()
            means = h.mean(0), missing.mean(0)
            h, missing = h - means[0], missing - means[1]
        strength = 0.3 * (h**2).sum(0).mean()
        # λ‖D‖² as more rows.
        rows = np.vstack([h, np.sqrt(strength) * np.eye(h.shape[1])])
        goal = np.vstack([missing, np.zeros((h.shape[1], missing.shape[1]))])
        expected = np.linalg.lstsq(rows, goal, rcond=None)[0]
        Ridge(strength=0.3).apply(model, WINDOWS, without(2, 3), journal=Silent())
        np.testing.assert_allclose(
            writer.weight.double().numpy() - weight, expected, atol=2e-4 * np.abs(expected).max()
        )
        if bias is not None:
            shift = means[1] - means[0] @ expected
            np.testing.assert_allclose((writer.bias - bias).numpy(), shift, atol=1e-3 * np.abs(shift).max())

    def test_of_several_runs_fits_each_in_the_model_with_those_before(self) -> None:
        model, twice = BY_NAME["llama"].model(LAYERS), BY_NAME["llama"].model(LAYERS)
        target = streams(twice, WINDOWS, [3])
        Ridge().apply(model, WINDOWS, without(1, 3), journal=Silent())
        Ridge().apply(twice, WINDOWS, without(1), journal=Silent())
        with skipped(twice, [1]):
            fit_seams(twice, WINDOWS, target, without(3), 0.1)
        assert all(torch.allclose(weight, twice.state_dict()[name]) for name, weight in model.state_dict().items())

    def test_of_a_run_at_layer_0_changes_nothing(self) -> None:
        model = BY_NAME["llama"].model(LAYERS)
        before = state(model)
        Ridge().apply(model, WINDOWS, without(0, 1), journal=Silent())
        assert not changed(model, before)

    @pytest.mark.parametrize("axis", ["ffn", "heads"])
    @pytest.mark.parametrize("name", ["llama", "llama-biased", "gpt2", "phi3"])
    def test_of_channels_is_least_squares_on_those_that_stay(self, name: str, axis: str) -> None:
        model = BY_NAME[name].model(2)
        try:
            channels = Channels(**{axis: getattr(draw_channels(model, (axis,)), axis)})  # type: ignore[arg-type]
        except Refusal:
            pytest.skip("this width cannot be cut")
        selection = without(channels=channels)
        written: list[Tensor] = []
        for narrow in (NO_CHANNELS, channels):
            with narrowed(model, narrow), seen_by(writer_of(model, 0, axis).module, "output") as seen, torch.no_grad():  # type: ignore[arg-type]
                model(input_ids=WINDOWS)
                written.append(seen[0][:, 1:].clone())
        error = (written[1] - written[0]).square().sum()
        Ridge(strength=1e-3).apply(model, WINDOWS, selection, journal=Silent())
        with narrowed(model, channels), seen_by(writer_of(model, 0, axis).module, "output") as seen, torch.no_grad():  # type: ignore[arg-type]
            model(input_ids=WINDOWS)
            assert (seen[0][:, 1:] - written[0]).square().sum() < 0.9 * error

    def test_of_channels_is_the_formula(self) -> None:
        model = BY_NAME["llama"].model(2)
        channels = draw_channels(model, ("ffn",))
        writer = writer_of(model, 1, "ffn")
        with seen_by(writer.module, "input") as seen, torch.no_grad():
            model(input_ids=WINDOWS)
            x = seen[0][:, 1:].flatten(0, 1).double()
        gram, weight = x.T @ x, writer.weight.double().T.clone()  # (hidden, ffn)
        removed = list(channels.ffn[1])
        stay = [channel for channel in range(len(gram)) if channel not in removed]
        ridge = 0.05 * gram.diagonal()[stay].mean() * torch.eye(len(stay), dtype=torch.float64)
        expected = (weight @ gram[:, stay] + weight[:, stay] @ ridge) @ torch.linalg.inv(gram[stay][:, stay] + ridge)
        Ridge(strength=0.05).apply(model, WINDOWS, without(channels=channels), journal=Silent())
        found = writer.weight.T
        assert torch.allclose(found[:, stay].double(), expected, atol=1e-4)
        assert torch.equal(found[:, removed], weight[:, removed].float())

    def test_of_channels_with_a_bias_and_a_large_strength_is_the_bias_of_flap(self) -> None:
        model = BY_NAME["llama-biased"].model(2)
        channels = draw_channels(model, ("ffn",))
        writer = writer_of(model, 1, "ffn")
        assert writer.bias is not None
        weight, bias = writer.weight.clone(), writer.bias.clone()
        with seen_by(writer.module, "input") as seen, torch.no_grad():
            model(input_ids=WINDOWS)
            mean = seen[0][:, 1:].flatten(0, 1).mean(0)
        removed = list(channels.ffn[1])
        Ridge(strength=1e9).apply(model, WINDOWS, without(channels=channels), journal=Silent())
        assert torch.allclose(writer.weight, weight, atol=1e-6)
        assert torch.allclose(writer.bias, bias + mean[removed] @ weight[removed], atol=1e-5)


def square(model: PreTrainedModel, strength: float) -> tuple[Tensor, Tensor]:
    """ReplaceMe's projection for layers 2 and 3, and the one there is."""
    writer = writer_of(model, 1, "ffn")
    with seen_by(writer.module, "output") as seen, torch.no_grad():
        model(input_ids=WINDOWS)
        m = seen[0][:, 1:].flatten(0, 1).double()
    rest = behind(model, 1, without()) - m
    ridge = strength * (m.T @ m).diagonal().mean() * torch.eye(m.shape[1], dtype=torch.float64)
    matrix = torch.linalg.solve(m.T @ m + ridge, m.T @ (behind(model, 3, without()) - rest) + ridge)
    return writer.weight.double() @ matrix, writer.weight


def test_linear_is_replaceme_s_matrix_in_the_projection() -> None:
    model = BY_NAME["llama"].model(LAYERS)
    expected, _ = square(model, 0.2)
    Linear(strength=0.2).apply(model, WINDOWS, without(2, 3), journal=Silent())
    assert torch.allclose(writer_of(model, 1, "ffn").weight.double(), expected, atol=1e-3 * expected.abs().max())


def test_merge_adds_the_differences_of_the_removed_layers() -> None:
    model = BY_NAME["mixtral"].model(LAYERS)
    before = state(model)
    Merge().apply(model, WINDOWS, without(2, 3), journal=Silent())
    for name, weight in model.state_dict().items():
        if name.startswith("model.layers.1."):
            two, three = (before[name.replace("layers.1.", f"layers.{layer}.")] for layer in (2, 3))
            assert torch.allclose(weight, two + three - before[name], atol=1e-6)
        else:
            assert torch.equal(weight, before[name])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "glm4", "opt-post-norm", "mixtral"])
@pytest.mark.parametrize("transfer", [Ridge(), Linear()], ids=lambda transfer: transfer.name)
def test_refuses_a_family_whose_projections_do_not_write_the_stream(
    name: str, transfer: Transfer, tmp_path: Path
) -> None:
    checkpoint = PrunableCheckpoint.open(release(BY_NAME[name].model(2), tmp_path))
    with pytest.raises(Refusal, match=f"regularize.transfer is {transfer.name}, but"):
        transfer.check(checkpoint)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_measures_that_a_norm_stands_between_where_the_table_would_not_say(name: str) -> None:
    model = BY_NAME[name].model(LAYERS)
    with pytest.raises(Refusal, match="does not add the output of its last projection"):
        Ridge().apply(model, WINDOWS, without(2), journal=Silent())


def test_merge_refuses_layers_of_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="layer 1 has other tensors than layer 0"):
        Merge().check(PrunableCheckpoint.open(release(BY_NAME["qwen3_moe"].model(4), tmp_path)))


@pytest.mark.parametrize("transfer", [Ridge(), Linear(), Merge()], ids=lambda transfer: transfer.name)
def test_the_cut_model_computes_what_the_full_size_one_computes_without_the_layers(
    transfer: Transfer, tmp_path: Path
) -> None:
    """`verify_cut` proves it: everything but the re-fitted projections is the release's, byte for byte."""
    model = BY_NAME["llama"].model(LAYERS)
    source = release(model, tmp_path / "release")
    transfer.apply(model, WINDOWS, without(1, 3), journal=Silent())
    with skipped(model, [1, 3]):
        expected = logits(model)
    save_model(model, source, tmp_path / "moved")
    cut_checkpoint(tmp_path / "moved", tmp_path / "cut", (1, 3))
    verify_cut(tmp_path / "moved", tmp_path / "cut", (1, 3))
    from components.lib.transformer.checkpoint import load_model

    assert torch.equal(logits(load_model(tmp_path / "cut")), expected)


def test_runs_are_neighbouring_layers() -> None:
    assert runs_of([9, 4, 6, 5]) == [(4, 6), (9, 9)]
    assert runs_of([]) == []


def test_naming_a_transfer_imports_no_torch() -> None:
    code = "import sys; from components.lib.transfers import linear, merge, reconstruct, ridge, scale; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
