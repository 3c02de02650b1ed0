"""The removal: a table of the axes, the strip of layers, and the parts that the methods add."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from components.lib.recipe.schema import Recipe
from components.lib.report_parts import Part
from components.lib.transformer.removal import Removal, percent
from components.register.format import ABSENT, number
from components.register.report import Curves, Report
from components.register.searched import parts as searched
from components.register.sections.section import Cell, ReportSection


@dataclass(frozen=True)
class Layer:
    """A box of the strip of layers."""

    index: int
    scores: list[str]
    height: int
    """In per cent of the tallest."""
    removed: int | None
    """1 for the layer that was removed first; None for a layer that stays."""


def removed(report: Report, curves: Curves) -> ReportSection:
    """Show the removal, with the parts of the methods that chose it."""
    return removed_section(report, [*searched(report.search), *curves.parts])


def removed_section(report: Report, parts: Sequence[Part]) -> ReportSection:
    """Show the removal.

    Args:
        report: its selection says what was removed.
        parts: what the methods add, in the order of the page.
    """
    selection = report.selection
    data = {
        "axes": _axes(report) if selection.channels else [],
        "layers": _layers(report) if selection.removed else [],
        "order": selection.order,
        "count": report.layers,
        "scored": [_meaning(report.parsed_recipe(), name) for name in _scored(report)],
        "parts": parts,
    }
    return ReportSection("What was removed", "removed.html.j2", data)


def _axes(report: Report) -> list[tuple[str, list[Cell]]]:
    """Return an axis; its size before and after, the removed part, and the part that was asked for."""
    recipe = report.parsed_recipe()
    rows: list[tuple[str, list[Cell]]] = []
    for removal in report.removals():
        asked, why = (None, "searched") if report.search else _asked(removal, recipe)
        cells = [
            Cell(f"{removal.before:,}"),
            Cell(f"{removal.after:,}"),
            Cell(percent(removal.part), f"{removal.removed:,}"),
            Cell(ABSENT if asked is None else percent(asked), why),
        ]
        rows.append((removal.axis, cells))
    return rows


def _asked(removal: Removal, recipe: Recipe) -> tuple[float | None, str]:
    """Return the part of an axis that the recipe asks for, None for an axis that shrinks with another; and why it differs."""
    for method in recipe.methods.chosen:
        part = method.asked(removal.axis)
        if part is not None:
            return part, method.rounding(removal) if abs(removal.part - part) > 5e-4 else ""
    return None, f"shrinks with {'heads' if removal.axis == 'hidden' else 'hidden'} in this family"


def _meaning(recipe: Recipe, score: str) -> str:
    """Return the meaning of a score in the words of the method that left it; its name if none explains it."""
    return next((method.scores[score] for method in recipe.methods.chosen if score in method.scores), score)


def _layers(report: Report) -> list[Layer]:
    """Return every layer of the dense model with its scores and its place in the order of removal."""
    scores = [[score or None for score in report.selection.scores[name]] for name in _scored(report)]
    heights = _heights(scores[0]) if scores else [0] * report.layers
    order = {layer: place for place, layer in enumerate(report.selection.order, start=1)}
    return [
        Layer(index, [number(score[index], 3) for score in scores], height, order.get(index))
        for index, height in enumerate(heights)
    ]


def _scored(report: Report) -> list[str]:
    """Return the names of the scores that have a number for each layer."""
    return [name for name, values in report.selection.scores.items() if len(values) == report.layers]


def _heights(scores: Sequence[float | None]) -> list[int]:
    """Return the heights of the bars, from 8 to 100 per cent.

    The scale is logarithmic if one score is more than 20 times another: the first layer's often is.
    """
    known = [score for score in scores if score is not None and math.isfinite(score)]
    if not known:
        return [0] * len(scores)
    logarithmic = min(known) > 0 and max(known) > 20 * min(known)
    scale = math.log if logarithmic else float
    low, high = scale(min(known)), scale(max(known))
    return [
        round(8 + 92 * (scale(score) - low) / ((high - low) or 1)) if score is not None and math.isfinite(score) else 0
        for score in scores
    ]
