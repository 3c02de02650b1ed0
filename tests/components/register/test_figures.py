"""The figures are elements of the page: its colours, its font, nothing to load, the same bytes each time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.lib.methods.trsp.report import Round, gates
from components.lib.report_parts import Line, Lines, Mark
from components.register import figures
from components.register.measured import Measured
from tests.components.register.conftest import measurements, trajectory

MODELS = {name: Measured.model_validate(model) for name, model in measurements().items()}
ROUNDS = [Round(line["round"], line["step"], tuple(line["gates"])) for line in trajectory()]
HOSTILE = r"a<b>&\1 $x_2$ {{ 7 }} '\""

MARK = Mark(15, "gates at 0")


def legend(*names: str) -> Lines:
    lines = [Line(name, [(step, 1 / step) for step in range(1, 101)]) for name in names]
    return Lines(x="step", y="norm", lines=lines, summary="norms", marks=[MARK])


@cache
def drawn() -> dict[str, str]:
    return {
        "gates": figures.lines(gates(ROUNDS, (4, 7, 9))),
        "curve": figures.curve([(step, 1 / step) for step in range(1, 101)], "loss", mark=MARK),
        "legend": figures.lines(legend("attention", "feed-forward", "rest")),
        "pareto": figures.pareto(MODELS, "technical"),
    }


@pytest.mark.parametrize("name", ["gates", "curve", "legend", "pareto"])
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


def test_each_line_of_a_legend_has_a_name_and_a_look_of_its_own() -> None:
    svg = drawn()["legend"]
    assert all(f">{part}<" in svg for part in ("attention", "feed-forward", "rest", "gates at 0"))
    assert len(set(re.findall(r"stroke-dasharray: [\d., ]+", svg))) == 3  # two of the lines, and the mark


def test_no_line_of_a_legend_is_left_out() -> None:
    names = [f"line {number}" for number in range(8)]
    assert all(f">{name}<" in figures.lines(legend(*names)) for name in names)


def test_hostile_names_stay_text() -> None:
    svg = figures.curve([(0, 1.0), (1, 2.0)], HOSTILE, mark=Mark(0.5, HOSTILE))
    tree = ElementTree.fromstring(svg)
    assert HOSTILE in [text.text for text in tree.iter("text")]
    assert HOSTILE in (tree.get("aria-label") or "")


def test_one_point_and_a_flat_curve_can_be_drawn() -> None:
    assert "<svg" in figures.curve([(5, 1.0)], "loss")
    assert "<svg" in figures.lines(gates([Round(0, 1, (1.0, None))], (0, 1)))


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), max_size=8), st.floats(0.01, 100))
def test_names_are_moved_apart_and_keep_their_order(positions: list[float], gap: float) -> None:
    placed = figures.spread(positions, gap)
    order = sorted(range(len(positions)), key=positions.__getitem__)
    assert all(placed[above] - placed[below] >= gap - 1e-6 for below, above in pairwise(order))
    if all(positions[above] - positions[below] >= gap for below, above in pairwise(order)):
        assert placed == pytest.approx(positions)
