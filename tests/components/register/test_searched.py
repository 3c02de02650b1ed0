"""A search in the report: its curve, and whether what it found holds after the whole recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.lib.depth import Point, Search
from components.register.description import methods_with_ratios
from components.register.page import render
from components.register.report import Report
from components.register.searched import parts, target_sentence
from tests.components.register.conftest import RECIPE, build_report, curves_of, write_run

SEARCH = Search(
    field="max_perplexity_ratio",
    bound=1.2,
    points=(
        Point(part=0.5, ratios={"trsp": 0.125}, value=1.05, holds=True),
        Point(part=0.75, ratios={"trsp": 0.1875}, value=1.15, holds=True),
        Point(part=1.0, ratios={"trsp": 0.25}, value=1.3, holds=False),
    ),
    part=0.75,
    next={"trsp": 0.125},
)


def reported(folder: Path, bound: float, search: Search = SEARCH) -> Report:
    """The report of a run that searched. Its candidate's perplexity is 0.99 of dense on one text and 1.14 on the other."""
    write_run(folder)
    search.save(folder / "selection")
    return build_report(folder, RECIPE + f"target: {{max_perplexity_ratio: {bound}}}\n")


def test_the_curve_has_the_measured_depths_and_the_target() -> None:
    (curve,) = parts(SEARCH)
    assert curve.kind == "lines"
    assert [line.points for line in curve.lines] == [[(0.5, 1.05), (0.75, 1.15), (1.0, 1.3)], [(0.5, 1.2), (1.0, 1.2)]]
    assert "methods.trsp.ratio 0.1875 was chosen (1.150)" in curve.caption
    assert parts(None) == []


def test_a_target_that_holds_is_said_with_its_ratio(tmp_path: Path) -> None:
    assert target_sentence(reported(tmp_path, 1.2)) == (
        "The target max_perplexity_ratio 1.2 holds after the whole recipe, at methods.trsp.ratio 0.1875, which the search found."
    )


@pytest.mark.parametrize(
    ("following", "cure"),
    [({"trsp": 0.125}, "ask for methods.trsp.ratio 0.125"), (None, "no other depth is left: ask for less")],
)
def test_one_that_does_not_is_said_with_the_ratio_to_ask_for_next(
    following: dict[str, float] | None, cure: str, tmp_path: Path
) -> None:
    search = SEARCH.model_copy(update={"next": following})
    said = target_sentence(reported(tmp_path, 1.1, search))
    assert said.endswith(f"at methods.trsp.ratio 0.1875, so that nothing is registered: {cure}.")


def test_the_page_has_the_sentence_and_the_curve(tmp_path: Path) -> None:
    report = reported(tmp_path, 1.2)
    html = render(report, curves_of(tmp_path))
    for words in (target_sentence(report), "The search for the depth"):
        assert words in html


def test_the_versions_ratio_is_the_one_that_was_found(tmp_path: Path) -> None:
    assert methods_with_ratios(reported(tmp_path, 1.2)) == "trsp 0.1875"


def test_without_a_target_nothing_is_said(report: Report) -> None:
    assert target_sentence(report) == ""
