"""DReSS's choice: as many channels of each axis as asked, and those that do the least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from transformers import PreTrainedModel

from components.lib.errors import Refusal
from components.lib.methods.dress import Dress
from components.lib.training.journal import Journal, Silent
from components.lib.transformer.gates import skipped
from components.lib.transformer.layout import Axis
from components.lib.transformer.selection import AXES, NOTHING, Channels, Selection
from tests.components.lib.training.tiny import Written, chosen, counting, llama, same, weights
from tests.components.lib.transformer.zoo import FFN_ONLY, NARROWABLE, Specimen, scale_slices, widths_of

LAYERS = 3
BY_NAME = {specimen.name: specimen for specimen in NARROWABLE}
WAYS = get_args(Dress.model_fields["channels"].annotation)


@pytest.fixture
def model() -> PreTrainedModel:
    return llama(LAYERS)


def choose(
    model: PreTrainedModel,
    channels: str = "activation",
    axes: tuple[Axis, ...] = AXES,
    before: Selection | None = None,
    journal: Journal | None = None,
    **fields: Any,
) -> Selection:
    dress = Dress(**{"channels": channels, "axes": axes, "ratio": 0.5, "multiple": 4} | fields)
    return dress.choose(model, counting(), before or NOTHING, journal=journal or Silent(), out=None)


@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    def test_chooses_as_many_of_every_layer_as_the_ratios_ask_for(self, model: PreTrainedModel, way: str) -> None:
        selection = choose(model, way, ratio={"hidden": 0.25, "ffn": 0.75, "heads": 0.5})
        assert (selection.method, selection.channels.axes, selection.removed) == ("dress", AXES, ())
        assert len(selection.channels.hidden) == 8
        assert [len(gone) for gone in selection.channels.ffn] == [36] * LAYERS
        assert [len(gone) for gone in selection.channels.heads] == [1] * LAYERS
        for gone in (selection.channels.hidden, *selection.channels.ffn, *selection.channels.heads):
            assert gone == tuple(sorted(set(gone)))

    def test_chooses_of_the_axes_asked_for_alone(self, model: PreTrainedModel, way: str) -> None:
        selection = choose(model, way, axes=("ffn",))
        assert selection.channels.axes == ("ffn",)

    @pytest.mark.parametrize("specimen", FFN_ONLY, ids=str)
    def test_chooses_ffn_channels_of_a_model_with_tensors_beside_its_layout(self, specimen: Specimen, way: str) -> None:
        selection = choose(specimen.model(LAYERS), way, axes=("ffn",))
        assert [len(set(gone)) for gone in selection.channels.ffn] == [24] * LAYERS

    def test_leaves_the_model_as_it_was(self, model: PreTrainedModel, way: str) -> None:
        before = weights(model)
        choose(model, way)
        assert same(weights(model), before)
        assert not [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]

    def test_chooses_the_same_again(self, model: PreTrainedModel, way: str) -> None:
        assert choose(model, way) == choose(model, way)

    def test_keeps_what_was_chosen_before(self, model: PreTrainedModel, way: str) -> None:
        before = Selection(method="trsp", removed=(0, 2), order=(2, 0), scores={"gate": (0.1, 1.0, 0.2)})
        selection = choose(model, way, axes=("ffn",), before=before)
        assert (selection.method, selection.channels.axes) == ("trsp+dress", ("ffn",))
        assert (selection.removed, selection.order, selection.scores) == (before.removed, before.order, before.scores)
        assert len(selection.channels.ffn) == LAYERS

    @pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "olmo2", "opt", "gemma3"])
    def test_chooses_of_families_of_other_layouts(self, name: str, way: str) -> None:
        model = BY_NAME[name].model(LAYERS)
        selection = choose(model, way)
        for axis in AXES:
            assert selection.channels.count(axis) == widths_of(model).of(axis) // 2


class TestRandom:
    def test_is_drawn_from_the_seed(self, model: PreTrainedModel) -> None:
        one, other = choose(model, "random", seed=0).channels, choose(model, "random", seed=1).channels
        assert one.hidden != other.hidden
        assert one.ffn != other.ffn
        assert len(set(one.ffn)) == LAYERS

    def test_knows_nothing_of_the_weights(self) -> None:
        assert choose(llama(LAYERS, seed=0), "random") == choose(llama(LAYERS, seed=1), "random")


@pytest.mark.parametrize("way", ["magnitude", "activation", "wanda", "fluctuation"])
@pytest.mark.parametrize("name", ["llama", "llama-biased", "gpt2", "phi3", "gpt_neox", "olmo2", "gemma2"])
class TestTheLeast:
    """Channels whose weights are next to nothing go, however the family names, fuses and turns its weights."""

    def test_is_found_in_each_layer(self, name: str, way: str) -> None:
        model = BY_NAME[name].model(LAYERS)
        idle = Channels(ffn=((0, 1, 2, 47), (8, 9, 30, 31), (1, 2, 3, 4)))
        scale_slices(model, idle, 1e-2)
        assert choose(model, way, axes=("ffn",), ratio=1 / 12).channels == idle

    def test_is_found_among_the_groups_and_in_the_residual_stream(self, name: str, way: str) -> None:
        """Where the two go together, half of each."""
        model = BY_NAME[name].model(LAYERS, heads=4, key_value_heads=4)
        idle = Channels(hidden=tuple(range(1, 32, 2)), heads=((0, 3), (1, 2), (0, 1)))
        scale_slices(model, idle, 1e-2)
        assert choose(model, way, axes=("hidden", "heads")).channels == idle


class TestActivation:
    def test_tells_a_channel_that_is_never_active_by_the_text(self, model: PreTrainedModel) -> None:
        """Its weights are as large as the others', and larger."""
        block = model.model.layers[1]
        with torch.no_grad():
            block.mlp.up_proj.weight[5] = 0
            block.mlp.down_proj.weight[:, 5] *= 3
        assert 5 in choose(model, "activation", axes=("ffn",), ratio=1 / 12).channels.ffn[1]
        assert 5 not in choose(model, "magnitude", axes=("ffn",), ratio=1 / 12).channels.ffn[1]

    def test_is_the_energy_that_the_projection_hands_on(self, model: PreTrainedModel) -> None:
        """‖W_·j‖² · E[x_j²] of every intermediate channel j; the four smallest go."""
        down = model.model.layers[1].mlp.down_proj
        with torch.no_grad():
            down.weight *= torch.linspace(0.1, 3, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
        seen: list[torch.Tensor] = []
        handle = down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        model(input_ids=counting())
        handle.remove()
        score = down.weight.square().sum(0) * seen[0].square().mean((0, 1))
        expected = sorted(score.argsort()[:4].tolist())
        assert list(choose(model, axes=("ffn",), ratio=1 / 12).channels.ffn[1]) == expected

    @pytest.mark.parametrize(
        ("way", "score"),
        [
            ("wanda", lambda weight, x: weight.abs().sum(0) * x.square().mean(0).sqrt()),
            ("fluctuation", lambda weight, x: weight.square().sum(0) * x.var(0, correction=0)),
        ],
    )
    def test_the_scores_of_wanda_and_flap_are_their_papers(
        self, model: PreTrainedModel, way: str, score: Callable[..., torch.Tensor]
    ) -> None:
        down = model.model.layers[1].mlp.down_proj
        with torch.no_grad():
            down.weight *= torch.linspace(0.1, 3, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
        seen: list[torch.Tensor] = []
        handle = down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
        model(input_ids=counting())
        handle.remove()
        expected = sorted(score(down.weight, seen[0]).argsort()[:24].tolist())
        assert list(choose(model, way, axes=("ffn",)).channels.ffn[1]) == expected

    def test_a_channel_that_never_varies_goes_first_by_its_fluctuation(self, model: PreTrainedModel) -> None:
        """Whatever it adds, a bias can add: so it has the largest activation, and no variance."""
        block = model.model.layers[1]
        handle = block.mlp.down_proj.register_forward_pre_hook(
            lambda module, inputs: (inputs[0].index_fill(-1, torch.tensor([7]), 9.0),), prepend=True
        )
        found = {
            way: choose(model, way, axes=("ffn",), ratio=1 / 12).channels.ffn[1]
            for way in ("activation", "fluctuation")
        }
        handle.remove()
        assert 7 in found["fluctuation"]
        assert 7 not in found["activation"]

    def test_is_measured_with_the_layers_bypassed_that_went_before(self, model: PreTrainedModel) -> None:
        """Layer 0 keeps what layer 1 reads as its first channels away from it."""
        before = chosen(0)
        found = choose(model, axes=("ffn",), before=before).channels.ffn[1]
        with skipped(model, [0]):
            expected = choose(model, axes=("ffn",)).channels.ffn[1]
        assert found == expected
        assert found != choose(model, axes=("ffn",)).channels.ffn[1]

    def test_is_measured_on_a_part_of_many_windows(self, model: PreTrainedModel) -> None:
        """And tells its progress to the end."""
        journal = Written()
        choose(model, journal=journal)
        assert [done for done, _ in journal.done] == [8, 16, 24]
        assert {total for _, total in journal.done} == {24}

    def test_is_measured_in_batches_of_its_own_size(self, model: PreTrainedModel) -> None:
        """The choice stays the same."""
        journal = Written()
        found = choose(model, journal=journal, batch_size=12)
        assert [done for done, _ in journal.done] == [12, 24]
        assert found == choose(model)


def test_what_cannot_be_cut_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(Refusal, match=r"of the 2 channels of the axis heads no number near 10% can go"):
        choose(model, axes=("heads",), ratio=0.1)


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(Refusal, match="use the method trsp"):
        choose(Specimen("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}).model(1))
