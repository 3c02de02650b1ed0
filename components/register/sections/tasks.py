"""Accuracy of every model on the tasks, with standard errors and the part of the dense model's accuracy that it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from components.register.accuracy import METRICS, Accuracy, Scores, accuracy, mean_accuracy
from components.register.format import ABSENT, number, percent, times
from components.register.measured import names, ratio
from components.register.report import Curves, Report
from components.register.sections.section import Cell, ReportSection


@dataclass(frozen=True)
class Row:
    """A metric of a task."""

    task: str
    metric: str
    cells: list[Cell]
    """One for each model."""


def tasks(report: Report, curves: Curves) -> ReportSection | None:
    """Compare the models task by task, the mean first; None if no task was measured."""
    models = report.models()
    found = names(model.tasks for model in models.values())
    if not found:
        return None
    rows = [*_mean(report), *(row for task in found for row in _rows(task, report))]
    limit = report.parsed_recipe().evaluate.task_limit
    return ReportSection("Tasks", "tasks.html.j2", {"models": list(models), "rows": rows, "limit": limit})


def _mean(report: Report) -> Iterator[Row]:
    judged = report.judged_tasks()
    if len(judged) > 1:
        found = [mean_accuracy(model.tasks, judged) for model in report.models().values()]
        yield Row(f"mean of {len(judged)} tasks", "of the first metric of each", _accuracies(found))


def _rows(task: str, report: Report) -> Iterator[Row]:
    """Yield a row for each metric of a task, its headline metric first."""
    scores = [model.tasks.get(task, {}) for model in report.models().values()]
    every = [name for name in names(scores) if not name.endswith("_stderr")]
    for metric in [name for name in METRICS if name in every]:
        yield Row(task, METRICS[metric], _accuracies([accuracy(one, metric) for one in scores]))
    for metric in [name for name in every if name not in METRICS]:
        yield Row(task, metric.replace("_", " "), _others(scores, metric))


def _accuracies(found: list[Accuracy | None]) -> list[Cell]:
    """Return an accuracy in per cent, its standard error in points, and its ratio to the dense model's, the first."""
    dense = found[0].value if found[0] else None
    return [
        Cell(
            percent(one.value),
            "" if one.error is None else f"± {100 * one.error:.1f}",
            times(ratio(one.value, dense)) if place else "",
        )
        if one
        else Cell(ABSENT)
        for place, one in enumerate(found)
    ]


def _others(scores: Sequence[Scores], metric: str) -> list[Cell]:
    return [Cell(number(one.get(metric)), times(ratio(one.get(metric), scores[0].get(metric)))) for one in scores]
