"""What TRSP and DReSS add to the report, from their own files and settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.lib.recipe.schema import Recipe
from components.lib.report_parts import Lines, Mark, Sentence
from components.lib.transformer.selection import NOTHING
from components.register import method_parts
from components.register.method_parts import Round, read_trajectory
from tests.components.register.conftest import CHANNELS, LAYERS, RECIPE, REMOVED, write_run

DRESS = RECIPE.replace("method: trsp", "method: dress\ndress: {axes: [ffn], channels: CHANNELS}")


def lines_of(parts: list[method_parts.Part]) -> Lines:
    (lines,) = parts
    assert isinstance(lines, Lines)
    return lines


def test_the_gates_of_removed_layers_stand_out_and_end_where_they_were_removed(tmp_path: Path) -> None:
    rounds = read_trajectory(write_run(tmp_path) / "selection")
    part = lines_of(method_parts.removed(LAYERS, Recipe.from_yaml(RECIPE), rounds))
    assert [line.name for line in part.lines if line.stands_out] == [f"layer {layer}" for layer in sorted(REMOVED)]
    assert [len(part.lines[layer].points) for layer in (9, 7, 4, 0)] == [12, 24, 36, 36]
    assert [mark.x for mark in part.marks] == [12.5, 24.5]
    assert part.summary == "Gates of 12 layers over 36 steps"


def test_a_gate_that_is_not_a_number_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "trajectory.jsonl").write_text('{"round": 0, "step": 1, "gates": [NaN, 0.5]}\n')
    assert read_trajectory(tmp_path) == [Round(0, 1, (None, 0.5))]


def test_a_method_without_gates_and_channels_adds_nothing(tmp_path: Path) -> None:
    assert method_parts.removed(NOTHING, Recipe.from_yaml(RECIPE), read_trajectory(tmp_path)) == []


@pytest.mark.parametrize(
    ("channels", "words"),
    [("random", "drawn at random"), ("magnitude", "smallest weights."), ("activation", "weights × activations")],
)
def test_the_choice_of_channels_is_explained(channels: str, words: str) -> None:
    (part,) = method_parts.removed(CHANNELS, Recipe.from_yaml(DRESS.replace("CHANNELS", channels)), [])
    assert isinstance(part, Sentence)
    assert words in part.text


def test_the_slices_are_one_picture_with_a_line_for_each_part_of_the_model() -> None:
    curves = {"loss": [(1, 4.0)], "slices_rest": [(1, 1.0)], "slices_ffn": [(1, 1.0), (2, 0.5)]}
    mark = Mark(15, "gates at 0")
    part = lines_of(method_parts.training(Recipe.from_yaml(RECIPE), curves, mark))
    assert [line.name for line in part.lines] == ["feed-forward", "embeddings, head and norms"]
    assert part.marks == [mark]
    assert method_parts.training(Recipe.from_yaml(RECIPE), {"loss": [(1, 4.0)]}, mark) == []
