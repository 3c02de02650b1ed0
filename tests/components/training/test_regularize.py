"""Regularising, its controls, and what stays true of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from components.recipe import Lora, Objective, Regularize
from components.training.regularize import needs_teacher, regularize
from components.transformer.gates import skipped, watched
from components.transformer.perplexity import perplexity
from components.transformer.selection import NOTHING
from components.transformer.surgery import drop_layers
from tests.components.training.tiny import Kept, Killed, Written, chosen, counting, llama, same, weights

LM = Objective(lm=1, kl=0, state=0)


@pytest.fixture(scope="module")
def taught() -> LlamaForCausalLM:
    """A dense model that has learnt to count, so that removing a layer costs something."""
    return regularize(llama(), None, counting(), NOTHING, settings(steps=60, objective=LM))


def settings(**fields: Any) -> Regularize:
    return Regularize(**{"steps": 20, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32"} | fields)


def change(model: LlamaForCausalLM, layer: int) -> float:
    """Return ‖f(x) − x‖² / ‖x‖² of a layer over the text."""
    with watched(model, [layer]) as seen, torch.no_grad():
        model(input_ids=counting())
        x, f = seen[layer]
        return ((f - x).square().sum() / x.square().sum()).item()


def test_annealed_layers_can_go_without_loss(taught: LlamaForCausalLM) -> None:
    removed = [1, 2]
    cut = perplexity(drop_layers(copy.deepcopy(taught), removed), counting())
    model = regularize(copy.deepcopy(taught), taught, counting(), chosen(*removed), settings())
    after = perplexity(drop_layers(model, removed), counting())
    assert after < 0.7 * cut


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_penalty_makes_the_chosen_layers_nearly_the_identity(taught: LlamaForCausalLM, norm: str) -> None:
    fields = {"schedule": "penalty", "norm": norm, "objective": LM, "steps": 40}
    penalised = regularize(copy.deepcopy(taught), None, counting(), chosen(1), settings(strength=3.0, **fields))
    free = regularize(copy.deepcopy(taught), None, counting(), chosen(1), settings(strength=0.0, **fields))
    assert change(penalised, 1) < 0.3 * change(free, 1)
    assert change(penalised, 2) > change(penalised, 1)


def test_the_curve_has_every_part_by_name(taught: LlamaForCausalLM) -> None:
    journal = Written()
    regularize(
        copy.deepcopy(taught), taught, counting(), chosen(1), settings(steps=2, schedule="penalty"), journal=journal
    )
    assert set(journal.lines[0][1]) == {"loss", "lm", "kl", "state", "penalty", "learning_rate", "gradient_norm"}
    assert journal.lines[0][1]["kl"] == pytest.approx(0, abs=1e-5)  # nothing has moved yet


def test_a_control_gets_the_objective_alone(taught: LlamaForCausalLM) -> None:
    journal = Written()
    asked = settings(steps=2, schedule="penalty")
    cut = drop_layers(copy.deepcopy(taught), [1])
    regularize(cut, taught, counting(), chosen(1), asked, already_cut=True, journal=journal)
    assert "penalty" not in journal.lines[0][1]


def test_cutting_first_is_annealing_over_no_step(taught: LlamaForCausalLM) -> None:
    """The candidate and its control differ in when the layers go, and in nothing else."""
    candidate = regularize(copy.deepcopy(taught), taught, counting(), chosen(1), settings(steps=4, anneal=0.01))
    control = regularize(
        drop_layers(copy.deepcopy(taught), [1]), taught, counting(), chosen(1), settings(steps=4), already_cut=True
    )
    assert same(weights(drop_layers(candidate, [1])), weights(control))


def test_the_teacher_does_not_move(taught: LlamaForCausalLM) -> None:
    before = weights(taught)
    regularize(copy.deepcopy(taught), taught, counting(), chosen(1), settings(steps=2))
    assert same(weights(taught), before)


def test_the_model_comes_back_in_the_type_it_came_in(taught: LlamaForCausalLM) -> None:
    model = regularize(
        copy.deepcopy(taught).bfloat16(), taught, counting(), chosen(1), settings(steps=2, precision="auto")
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


class TestAdapters:
    def test_their_teacher_is_the_model_without_them_and_without_its_gates(self, taught: LlamaForCausalLM) -> None:
        asked = settings(steps=6, trainable="lora", lora=Lora(rank=4), anneal=0.5)
        own, given = Written(), Written()
        assert not needs_teacher(asked)
        regularize(copy.deepcopy(taught), None, counting(), chosen(1), asked, journal=own)
        regularize(copy.deepcopy(taught), taught, counting(), chosen(1), asked, journal=given)
        assert own.curve("kl") == pytest.approx(given.curve("kl"), rel=1e-4)

    def test_they_are_merged_into_a_plain_model_that_computes_the_same(self, taught: LlamaForCausalLM) -> None:
        model = regularize(
            copy.deepcopy(taught), None, counting(), chosen(1), settings(trainable="lora", lora=Lora(rank=4), steps=30)
        )
        assert weights(model).keys() == weights(taught).keys()
        with skipped(taught, [1]):
            assert perplexity(drop_layers(model, [1]), counting()) < perplexity(taught, counting())

    def test_a_control_with_adapters_needs_the_dense_model(self, taught: LlamaForCausalLM) -> None:
        assert needs_teacher(settings(trainable="lora"), already_cut=True)
        cut = drop_layers(copy.deepcopy(taught), [1])
        with pytest.raises(ValueError, match="give it as the teacher"):
            regularize(cut, None, counting(), chosen(1), settings(trainable="lora"), already_cut=True)


@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("killed_at", [3, 5])
def test_killed_and_taken_up_it_ends_with_the_very_weights(
    taught: LlamaForCausalLM, tmp_path: Path, trainable: str, killed_at: int
) -> None:
    """Killed while the gates fall (3), and when the layers are skipped already (5)."""
    asked = settings(steps=6, anneal=0.6, trainable=trainable, lora=Lora(rank=4, dropout=0.2), checkpoint_every=2)
    uninterrupted = regularize(copy.deepcopy(taught), taught, counting(), chosen(1, 2), asked)
    checkpoints = Kept(tmp_path / "kept")
    journal = Written(killed_at=killed_at)
    with pytest.raises(Killed):
        regularize(
            copy.deepcopy(taught), taught, counting(), chosen(1, 2), asked, checkpoints=checkpoints, journal=journal
        )
    resumed = regularize(copy.deepcopy(taught), taught, counting(), chosen(1, 2), asked, checkpoints=checkpoints)
    assert same(weights(resumed), weights(uninterrupted))


def test_no_schedule_leaves_the_model_alone(taught: LlamaForCausalLM) -> None:
    model = copy.deepcopy(taught)
    assert regularize(model, None, counting(), chosen(1), settings(schedule="none")) is model
    assert same(weights(model), weights(taught))
