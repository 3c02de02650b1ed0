"""The figures are elements of the page: its colours, its font, nothing to load, the same bytes each time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.register import figures
from components.register.measured import Measured
from components.register.report import Round
from tests.components.register.conftest import measurements, trajectory

MODELS = {name: Measured.model_validate(model) for name, model in measurements().items()}
ROUNDS = [Round(line["round"], line["step"], tuple(line["gates"])) for line in trajectory()]
HOSTILE = r"a<b>&\1 $x_2$ {{ 7 }} '\""


@cache
def drawn() -> dict[str, str]:
    return {
        "gates": figures.gates(ROUNDS, (4, 7, 9)),
        "curve": figures.curve([(step, 1 / step) for step in range(1, 101)], "loss", mark=(15, "gates at 0")),
        "slices": figures.slices(
            {part: [(step, 1 / step) for step in range(1, 101)] for part in ("attention", "feed-forward", "rest")},
            "norm",
            mark=(15, "gates at 0"),
        ),
        "pareto": figures.pareto(MODELS, "technical"),
    }


@pytest.mark.parametrize("name", ["gates", "curve", "slices", "pareto"])
def test_a_figure_takes_the_pages_colours_and_loads_nothing(name: str) -> None:
    svg = drawn()[name]
    ElementTree.fromstring(svg)
    assert not re.search(r"https?:|xmlns|@import|<style|<script", svg)
    assert not re.search(r"#0\d0\d0\d|#000000|#ffffff", svg), "a colour that does not follow the page"
    assert "var(--accent)" in svg
    assert set(re.findall(r"font-family: ([^;\"]+)", svg)) == {"inherit"}


def test_the_same_inputs_give_the_same_bytes() -> None:
    assert drawn.__wrapped__() == drawn()


def test_removed_layers_are_named_and_others_are_not() -> None:
    assert set(re.findall(r"layer \d+", drawn()["gates"])) == {"layer 4", "layer 7", "layer 9"}


def test_every_model_with_the_number_is_a_named_point() -> None:
    assert all(f">{name}<" in drawn()["pareto"] for name in MODELS)
    without = {**MODELS, "champion": MODELS["champion"].model_copy(update={"perplexity": {}})}
    assert ">champion<" not in figures.pareto(without, "technical")


def test_each_part_of_the_model_has_a_name_and_a_line_of_its_own() -> None:
    svg = drawn()["slices"]
    assert all(f">{part}<" in svg for part in ("attention", "feed-forward", "rest", "gates at 0"))
    assert len(set(re.findall(r"stroke-dasharray: [\d., ]+", svg))) == 3  # two of the lines, and the mark


def test_hostile_names_stay_text() -> None:
    svg = figures.curve([(0, 1.0), (1, 2.0)], HOSTILE, mark=(0.5, HOSTILE))
    tree = ElementTree.fromstring(svg)
    assert HOSTILE in [text.text for text in tree.iter("text")]
    assert HOSTILE in (tree.get("aria-label") or "")


def test_one_point_and_a_flat_curve_can_be_drawn() -> None:
    assert "<svg" in figures.curve([(5, 1.0)], "loss")
    assert "<svg" in figures.gates([Round(0, 1, (1.0, None))], ())


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), max_size=8), st.floats(0.01, 100))
def test_names_are_moved_apart_and_keep_their_order(positions: list[float], gap: float) -> None:
    placed = figures.spread(positions, gap)
    order = sorted(range(len(positions)), key=positions.__getitem__)
    assert all(placed[above] - placed[below] >= gap - 1e-6 for below, above in pairwise(order))
    if all(positions[above] - positions[below] >= gap for below, above in pairwise(order)):
        assert placed == pytest.approx(positions)
