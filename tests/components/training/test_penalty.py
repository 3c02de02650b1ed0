"""The penalty against its formula, its ramp, and the annealed gates."""

from __future__ import annotations

import pytest
import torch

from components.training.penalty import annealed, gated_at, penalty, ramped, relative_change
from components.transformer.gates import skipped, watched
from tests.components.training.tiny import counting, llama


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
