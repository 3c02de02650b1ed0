"""Every stage that the recipe asks for is planned, by its own code."""

from __future__ import annotations

import pytest

from components.lib.methods import known_methods
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.transfers import known_transfers
from pipeline.plan.stages import Shape, needs
from pipeline.recompress import recompress
from pipeline.runners.graph import tasks_of
from tests.pipeline.plan.shapes import TINY

SHAPE = Shape(TINY, "bfloat16")


def recipe(*overrides: str, methods: str = "{shortgpt: {ratio: 0.25}}") -> Recipe:
    text = f"{{methods: {methods}, calibration: {{data: x.txt, length: 128}}, evaluate: {{perplexity: {{x: x.txt}}, speed: {{prompt: 32}}}}}}"
    return parse_recipe(text, overrides)


def test_all_stages_are_tasks_of_the_pipeline_in_its_order() -> None:
    asked = recipe(
        "recover.enabled=true", "evaluate.controls=[pruned-first, dense-trained]", "regularize.transfer=ridge"
    )
    found = [need.stage for need in needs(asked, SHAPE, "cpu")]
    assert set(found) <= {task.name for task in tasks_of(recompress)}
    assert found == ["pin", "learn-gates", "regularize", "prune", "lora-rft", "control", "control-2", "evaluate"]


def test_stages_that_the_recipe_does_not_ask_for_are_left_out() -> None:
    found = [need.stage for need in needs(recipe("regularize.schedule=none"), SHAPE, "cpu")]
    assert found == ["pin", "learn-gates", "prune", "evaluate"]


@pytest.mark.parametrize("name", sorted(known_methods()))
def test_every_method_can_be_planned(name: str) -> None:
    (need,) = needs(recipe(methods=f"{{{name}: {{ratio: 0.25}}}}"), SHAPE, "cuda", only=["learn-gates"])
    assert need.peak.total >= SHAPE.bytes


@pytest.mark.parametrize("name", sorted(known_transfers()))
def test_every_transfer_can_be_planned(name: str) -> None:
    asked = recipe("regularize.schedule=none", f"regularize.transfer={name}")
    (need,) = needs(asked, SHAPE, "cuda", only=["regularize"])
    assert need.peak.total > SHAPE.bytes


def test_the_kept_teacher_is_counted_on_the_disk() -> None:
    (beside,) = needs(recipe(), SHAPE, "cpu", only=["regularize"])
    (kept,) = needs(recipe("regularize.teacher_top=16"), SHAPE, "cpu", only=["regularize"])
    tokens = min(recipe().calibration.samples, 100 * 8) * 128
    assert kept.scratch - beside.scratch == tokens * (16 * 8 + 4 + 64 * 2)
    assert kept.moved == beside.moved
    assert kept.peak.teacher == 0


def test_checkpoints_are_counted_in_disk_and_traffic() -> None:
    (few,) = needs(recipe("regularize.steps=10"), SHAPE, "cpu", only=["regularize"])
    (many,) = needs(recipe("regularize.steps=201"), SHAPE, "cpu", only=["regularize"])
    state = many.scratch - few.scratch
    assert 3 * SHAPE.bytes < state < 7 * SHAPE.bytes  # fp32 weights and two states of them, of the layers that stay
    assert many.moved - few.moved == 4 * state
