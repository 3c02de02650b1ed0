"""The penalty against its formula, its ramp, and the annealed gates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.recipe.training import Lora
from components.lib.training.lora import adapted
from components.lib.training.penalty import Norm, Slices, annealed, gated_at, penalty, ramped, relative_change
from components.lib.transformer.gates import skipped, watched
from components.lib.transformer.selection import Channels
from tests.components.lib.training.tiny import counting, llama
from tests.components.lib.transformer.zoo import AXES_CUT, NARROWABLE, Specimen, draw_channels


def test_l2_is_the_squared_change_relative_to_the_input_token_by_token() -> None:
    x = torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])
    change = torch.tensor([[[5.0, 0.0], [0.0, 1.0]]])
    assert relative_change(x, x + change, "l2").item() == pytest.approx((25 / 25 + 1 / 0.25) / 2)


def test_l1_is_the_same_with_absolute_values() -> None:
    x = torch.tensor([[[3.0, -4.0], [0.3, 0.4]]])
    change = torch.tensor([[[7.0, 0.0], [0.0, -1.4]]])
    assert relative_change(x, x + change, "l1").item() == pytest.approx((7 / 7 + 1.4 / 0.7) / 2)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_neither_width_nor_length_nor_batch_nor_scale_changes_it(norm) -> None:
    x, change = torch.rand(2, 3, 8) + 0.5, torch.rand(2, 3, 8)
    once = relative_change(x, x + change, norm)
    larger, changes = x.repeat(2, 3, 4) * 10, change.repeat(2, 3, 4) * 10
    torch.testing.assert_close(relative_change(larger, larger + changes, norm), once)


def test_it_adds_the_layers_up_and_is_0_for_an_identity() -> None:
    model, batch = llama(), counting()[:2]
    with watched(model, [1, 2]) as seen, torch.no_grad():
        model(input_ids=batch)
        one, two = (relative_change(*seen[layer], "l2") for layer in (1, 2))
        torch.testing.assert_close(penalty(seen, "l2"), one + two)
    with skipped(model, [1]), watched(model, [1]) as seen:
        model(input_ids=batch)
        assert penalty(seen, "l2") == 0


def test_strength_rises_over_its_part_of_the_steps_and_gates_fall_over_theirs() -> None:
    assert [ramped(step, 10, 0.4) for step in range(6)] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert [annealed(step, 10, 0.4) for step in range(6)] == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    assert ramped(0, 10, 0.0) == 1


@torch.no_grad()
def test_gates_take_the_chosen_layers_from_whole_to_gone() -> None:
    model, batch = llama(), counting()[:2]
    whole = model(input_ids=batch).logits
    with skipped(model, [0, 2]):
        gone = model(input_ids=batch).logits
    outputs = []
    for gate in (1.0, 0.5, 0.0):
        with gated_at(model, [0, 2], gate):
            outputs.append(model(input_ids=batch, use_cache=False).logits)
    assert torch.equal(outputs[0], whole)
    assert torch.equal(outputs[2], gone)
    assert not torch.allclose(outputs[1], whole)
    assert not torch.allclose(outputs[1], gone)
    assert torch.equal(model(input_ids=batch).logits, whole)


HIDDEN, FFN, GROUP = (3, 5, 8), (0, 7), (1,)
CHANNELS = Channels(hidden=HIDDEN, ffn=(FFN,) * 2, heads=(GROUP,) * 2)


def sizes(slices: Slices, model: PreTrainedModel) -> dict[str, float]:
    return {name: norm.item() for name, norm in slices.norms(model).items()}


@torch.no_grad()
def scale(model: PreTrainedModel, name: str, factor: float) -> None:
    model.get_parameter(name).mul_(factor)


def union(weight: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """What goes of a matrix: rows and columns, and where they cross once."""
    gone = torch.zeros_like(weight, dtype=torch.bool)
    gone[list(rows)] = True
    gone[:, list(columns)] = True
    return weight[gone]


class TestSlices:
    @pytest.mark.parametrize("norm", ["l1", "l2"])
    @pytest.mark.parametrize("specimen", NARROWABLE, ids=str)
    def test_begin_at_1_in_every_part_of_every_family(self, specimen: Specimen, norm: Norm) -> None:
        model = specimen.model(2)
        found = sizes(Slices(model, draw_channels(model), norm), model)
        assert found == pytest.approx({"slices_attention": 1, "slices_ffn": 1, "slices_rest": 1})

    @pytest.mark.parametrize("axes", AXES_CUT, ids="+".join)
    def test_are_of_the_parts_that_the_axis_runs_through(self, axes) -> None:
        """The residual stream runs through all of them."""
        model = llama(2)
        parts = {"ffn": {"slices_ffn"}, "heads": {"slices_attention"}}
        everywhere = {"slices_attention", "slices_ffn", "slices_rest"}
        expected = set().union(*(parts.get(axis, everywhere) for axis in axes))
        assert set(sizes(Slices(model, draw_channels(model, axes), "l2"), model)) == expected

    @pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
    def test_are_taken_over_all_tensors_of_a_part_relative_to_the_start(self, norm: Norm, power: int) -> None:
        """Every matrix of the feed-forward layers is halved."""
        model = llama(2)
        slices = Slices(model, CHANNELS, norm)
        for layer in range(2):
            for name in ("gate", "up", "down"):
                scale(model, f"model.layers.{layer}.mlp.{name}_proj.weight", 0.5)
        found = sizes(slices, model)
        assert found["slices_ffn"] == pytest.approx(0.5**power)
        assert found["slices_attention"] == found["slices_rest"] == pytest.approx(1)

    @pytest.mark.parametrize("norm", ["l1", "l2"])
    def test_count_what_goes_by_its_row_and_by_its_column_once(self, norm: Norm) -> None:
        """All but one matrix of the part are at 0, so that the part is that matrix."""
        model = llama(2)
        weight = model.model.layers[0].mlp.down_proj.weight
        others = [name for name, _ in model.named_parameters() if ".mlp." in name and "layers.0.mlp.down" not in name]
        for name in others:
            scale(model, name, 0)
        slices = Slices(model, CHANNELS, norm)
        size = torch.square if norm == "l2" else torch.abs
        start = size(union(weight, HIDDEN, FFN)).sum()
        with torch.no_grad():
            weight[3] *= 3  # a row that goes
            weight[:, 7] *= 2  # a column that goes, across it
            weight[0, 1] += 5  # what stays
        grown = size(union(weight, HIDDEN, FFN)).sum() / start
        assert sizes(slices, model)["slices_ffn"] == pytest.approx(grown.item(), rel=1e-5)

    def test_are_nothing_of_what_stays(self) -> None:
        """Their gradient is in the rows and columns that go, and nowhere else."""
        model = llama(2)
        torch.stack(list(Slices(model, CHANNELS, "l2").norms(model).values())).sum().backward()
        gradient = model.model.layers[1].mlp.down_proj.weight.grad
        assert union(gradient, HIDDEN, FFN).ne(0).all()
        assert gradient.ne(0).sum() == union(gradient, HIDDEN, FFN).numel()
        embedding = model.get_input_embeddings().weight.grad
        assert set(embedding.ne(0).any(0).nonzero().flatten().tolist()) == set(HIDDEN)

    def test_count_tied_weights_once(self) -> None:
        """Of the rest there are an embedding, which is the head too, and norms."""
        model = llama(2)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        slices = Slices(model, CHANNELS, "l2")
        embedding = model.model.embed_tokens.weight[:, list(HIDDEN)].square().sum()
        norms = sum(weight[list(HIDDEN)].square().sum() for name, weight in model.named_parameters() if "norm" in name)
        scale(model, "model.embed_tokens.weight", 0)
        assert sizes(slices, model)["slices_rest"] == pytest.approx((norms / (norms + embedding)).item())

    def test_of_a_model_with_adapters_are_those_of_its_own_weights(self) -> None:
        model = llama(2)
        trained = adapted(model, Lora(rank=2), seed=0)
        slices = Slices(trained, CHANNELS, "l2")
        assert sizes(slices, trained) == pytest.approx({"slices_attention": 1, "slices_ffn": 1, "slices_rest": 1})
        for layer in model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                projection.base_layer.weight.data.zero_()
        assert sizes(slices, trained)["slices_ffn"] == 0

    def test_that_were_0_at_the_start_have_nothing_to_lose(self) -> None:
        model = llama(2)
        for name, _ in model.named_parameters():
            if ".mlp." in name:
                scale(model, name, 0)
        assert set(sizes(Slices(model, CHANNELS, "l2"), model)) == {"slices_attention", "slices_rest"}

    @pytest.mark.parametrize("norm", ["l1", "l2"])
    def test_sink_when_they_are_minimised(self, norm: Norm) -> None:
        model = llama(2)
        slices = Slices(model, CHANNELS, norm)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(40):
            optimizer.zero_grad()
            torch.stack(list(slices.norms(model).values())).sum().backward()
            optimizer.step()
        assert max(sizes(slices, model).values()) < 0.2
