"""Accuracy on tasks: the headline metric of each task, the mean over tasks, and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Scores = Mapping[str, float | None]
"""A task's metrics by name, with their standard errors, such as `acc_norm` and `acc_norm_stderr`."""

METRICS = {"acc_norm": "normalised accuracy", "acc": "accuracy"}
"""The headline metric of a task is the first of these that it has."""


@dataclass(frozen=True)
class Accuracy:
    """A part of questions that were answered correctly, between 0 and 1."""

    value: float
    error: float | None = None
    """Its standard error; None if it is not known."""


def accuracy(scores: Scores | None, metric: str = "") -> Accuracy | None:
    """Return a task's accuracy by the metric, or by its headline metric; None if it has none."""
    scores = scores or {}
    for name in (metric,) if metric else METRICS:
        value = scores.get(name)
        if value is not None:
            return Accuracy(value, scores.get(f"{name}_stderr"))
    return None


def judged_tasks(dense: Mapping[str, Scores]) -> list[str]:
    """Return the tasks whose accuracy counts, those that the dense model has an accuracy on, given its tasks."""
    return [task for task, scores in dense.items() if accuracy(scores)]


def mean_accuracy(tasks: Mapping[str, Scores], names: Iterable[str]) -> Accuracy | None:
    """Return the mean of the headline accuracies of the named tasks, or None if one of them has none.

    The errors of tasks are independent: that of the mean of n is √(Σ errorᵢ²) / n.
    """
    found = [accuracy(tasks.get(name)) for name in names]
    each = [one for one in found if one is not None]
    if not each or len(each) < len(found):
        return None
    errors = [one.error for one in each if one.error is not None]
    error = math.hypot(*errors) / len(each) if len(errors) == len(each) else None
    return Accuracy(math.fsum(one.value for one in each) / len(each), error)


def difference(one: Accuracy, other: Accuracy) -> Accuracy:
    """Return one − other. Its error is an upper bound, since both models answered the same questions."""
    if one.error is None or other.error is None:
        return Accuracy(one.value - other.value)
    return Accuracy(one.value - other.value, math.hypot(one.error, other.error))
