"""Size, perplexity and accuracy of every measured model, beside the dense model's, and what to know before believing them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from components.lib.recipe.schema import Recipe
from components.lib.transformer.removal import NOUNS
from components.register import figures
from components.register.format import ABSENT, count, number, times, whole
from components.register.measured import differing, names, ratio
from components.register.report import Curves, Report
from components.register.sections.section import Cell, ReportSection


def quality(report: Report, curves: Curves) -> ReportSection:
    """Compare the models."""
    data = {
        "columns": _columns(report),
        "rows": _rows(report),
        "notes": list(_notes(report)),
        "pareto": _pareto(report),
    }
    return ReportSection("Quality", "quality.html.j2", data)


def _columns(report: Report) -> list[Cell]:
    """Return the heads of the table: a name, and below it the kind of number."""
    texts, tasks = _measured_on(report)
    return [
        *(Cell(NOUNS[axis].removesuffix(" a layer")) for axis in differing(report.models().values())),
        *(Cell(name) for name in ("parameters", "size")),
        *(Cell(text, "perplexity") for text in texts),
        *(Cell(task, "accuracy") for task in tasks),
    ]


def _rows(report: Report) -> list[tuple[str, list[Cell]]]:
    """Return a model's name and its numbers in the order of the columns, each beside the dense model's."""
    texts, tasks = _measured_on(report)
    dense, axes = report.dense, differing(report.models().values())
    return [
        (
            name,
            [
                *(Cell(whole(model.along(axis)), _of(dense.along(axis))) for axis in axes),
                Cell(count(model.parameters), times(ratio(model.parameters, dense.parameters))),
                Cell(f"{count(model.bytes)}B", times(ratio(model.bytes, dense.bytes))),
                *(_compared(model.perplexity.get(text), dense.perplexity.get(text)) for text in texts),
                *(_accuracy(model.tasks.get(task), dense.tasks.get(task)) for task in tasks),
            ],
        )
        for name, model in report.models().items()
    ]


def _measured_on(report: Report) -> tuple[list[str], list[str]]:
    """Return the names of the texts and of the tasks that any model was measured on."""
    models = report.models().values()
    return names(model.perplexity for model in models), names(model.tasks for model in models)


def _compared(value: float | None, base: float | None) -> Cell:
    return Cell(number(value), times(ratio(value, base)) if value is not None else "")


def _of(base: int | None) -> str:
    return ABSENT if base is None else f"of {base:,}"


def _accuracy(found: Any, base: Any) -> Cell:
    """Return a task's accuracy in per cent, and the points it lies above or below the dense model's."""
    value, dense = task_accuracy(found), task_accuracy(base)
    if value is None:
        return Cell(ABSENT)
    return Cell(f"{value:.1%}", f"{100 * (value - dense):+.1f} points" if dense is not None else "")


def task_accuracy(found: Any) -> float | None:
    """Return a task's accuracy, between 0 and 1, or None if there is none.

    Args:
        found: a number, or metrics by name; of these the normalised accuracy is preferred.
    """
    if isinstance(found, Mapping):
        found = next((found[name] for name in ("accuracy", "acc_norm", "acc") if found.get(name) is not None), None)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _notes(report: Report) -> Iterator[str]:
    """Yield the caveats that apply to this run: the notes of the evaluation, and the controls that are missing."""
    recipe = report.parsed_recipe()
    for name, model in report.models().items():
        yield from (f"{name}: {note}." for note in model.notes)
    trained = recipe.regularize.schedule != "none" or recipe.recover.enabled
    if trained:
        yield from _adaptation(report, recipe)
    if trained and "pruned-first" not in report.controls:
        yield (
            "No control was cut first and then trained, so this report does not show whether training before the cut is better "
            "than training after it: add pruned-first to evaluate.controls."
        )
    if len(report.candidate.perplexity) == 1:
        yield "Only one text was measured: the quality on text of another domain is unknown."


def _adaptation(report: Report, recipe: Recipe) -> Iterator[str]:
    """Training on a text also adapts the model to it; the dense model with the same training shows by how much."""
    control = report.controls.get("dense-trained")
    near = [name for name, text in recipe.evaluate.perplexity.items() if _same_source(recipe, name)]
    if control is None:
        here = f" (here on {', '.join(near)})" if near else ""
        yield (
            f"Training on the calibration text also adapts the model to similar text, so a low perplexity on such text{here} "
            "proves little on its own. The dense model with the same training would show how large that effect is, but was "
            "not asked for: add dense-trained to evaluate.controls."
        )
        return
    moved = {text: ratio(value, report.dense.perplexity.get(text)) for text, value in control.perplexity.items()}
    told = ", ".join(f"{times(value)} on {text}" for text, value in moved.items() if value is not None)
    if told:
        yield (
            f"The same training moves the dense model's own perplexity to {told}. Below 1 it adapted to text like the "
            "calibration text, above 1 it forgot; the candidate's numbers contain both effects."
        )


def _same_source(recipe: Recipe, name: str) -> bool:
    """Return True if a text is in the folder or the Hub data set of the calibration text, hence of its domain."""
    text, calibration = recipe.evaluate.perplexity[name], recipe.calibration.data
    if text.hub or calibration.hub:
        return text.hub == calibration.hub and text.config == calibration.config
    path, beside = text.path or "", calibration.path or ""
    # The place of an object in the store is its digest and does not tell where the text came from.
    return path == beside or ("s3://" not in path + beside and Path(path).parent == Path(beside).parent)


def _pareto(report: Report) -> list[Markup]:
    texts = [text for text in report.dense.perplexity if ratio(report.dense.perplexity[text], 1.0)]
    return [Markup(figures.pareto(report.models(), text)) for text in texts]
