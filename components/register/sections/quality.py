"""Size, perplexity and accuracy of every measured model, beside the dense model's, and what to know before believing them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup

from components.lib.recipe.schema import Recipe
from components.lib.transformer.removal import NOUNS
from components.register import figures
from components.register.accuracy import mean_accuracy
from components.register.format import ABSENT, count, number, percent, times, whole
from components.register.measured import Measured, differing, names, ratio
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
    judged = report.judged_tasks()
    return [
        *(Cell(NOUNS[axis].removesuffix(" a layer")) for axis in differing(report.models().values())),
        *(Cell(name) for name in ("parameters", "size")),
        *(Cell(text, "perplexity") for text in _texts(report)),
        *([Cell("accuracy", judged[0] if len(judged) == 1 else f"mean of {len(judged)} tasks")] if judged else []),
    ]


def _rows(report: Report) -> list[tuple[str, list[Cell]]]:
    """Return a model's name and its numbers in the order of the columns, each beside the dense model's."""
    texts = _texts(report)
    dense, axes = report.dense, differing(report.models().values())
    return [
        (
            name,
            [
                *(Cell(whole(model.along(axis)), _of(dense.along(axis))) for axis in axes),
                Cell(count(model.parameters), times(ratio(model.parameters, dense.parameters))),
                Cell(f"{count(model.bytes)}B", times(ratio(model.bytes, dense.bytes))),
                *(_compared(model.perplexity.get(text), dense.perplexity.get(text)) for text in texts),
                *([_accuracy(model, report)] if report.judged_tasks() else []),
            ],
        )
        for name, model in report.models().items()
    ]


def _texts(report: Report) -> list[str]:
    """Return the names of the texts that any model was measured on."""
    return names(model.perplexity for model in report.models().values())


def _compared(value: float | None, base: float | None) -> Cell:
    return Cell(number(value), times(ratio(value, base)) if value is not None else "")


def _of(base: int | None) -> str:
    return ABSENT if base is None else f"of {base:,}"


def _accuracy(model: Measured, report: Report) -> Cell:
    """Return the mean accuracy in per cent, and the points it lies above or below the dense model's."""
    found, dense = (mean_accuracy(each.tasks, report.judged_tasks()) for each in (model, report.dense))
    if found is None:
        return Cell(ABSENT)
    return Cell(percent(found.value), f"{100 * (found.value - dense.value):+.1f} points" if dense else "")


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
