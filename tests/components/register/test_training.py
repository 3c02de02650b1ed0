"""The section on the training: the slices of the weights are one picture beside the panels of the metrics."""

from __future__ import annotations

from components.lib.recipe.loading import parse_recipe
from components.lib.report_parts import Lines, Mark
from components.register.sections.training import slices
from tests.components.register.conftest import RECIPE

MARK = Mark(15, "gates at 0")


def test_the_slices_are_one_picture_with_a_line_for_each_part_of_the_model() -> None:
    curves = {"loss": [(1, 4.0)], "slices_rest": [(1, 1.0)], "slices_ffn": [(1, 1.0), (2, 0.5)]}
    (part,) = slices(parse_recipe(RECIPE), curves, MARK)
    assert isinstance(part, Lines)
    assert [line.name for line in part.lines] == ["feed-forward", "embeddings, head and norms"]
    assert part.marks == [MARK]


def test_without_channels_there_is_no_such_picture() -> None:
    assert slices(parse_recipe(RECIPE), {"loss": [(1, 4.0)]}, MARK) == []
