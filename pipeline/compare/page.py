"""A comparison as one self-contained page: no request, no script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from components.register import figures
from components.register.format import ABSENT, count, number, percent, times
from components.register.page import templates
from components.register.sections.lineage import flat
from components.register.sections.section import Cell
from pipeline.compare.comparison import CANDIDATE, DENSE, Comparison, Row, Spread, undominated


class Axis(NamedTuple):
    """A metric as an axis of the pictures, relative to the dense model's."""

    metric: str
    more_is_better: bool = False

    @property
    def label(self) -> str:
        """Return its name in words."""
        return f"{self.metric.replace('bytes', 'size').replace(' tok/s', ' speed')}, of dense"


def render(comparison: Comparison) -> str:
    """Return the page. The same comparison gives the same page."""
    template = templates(Path(__file__).parent).get_template("comparison.html.j2")
    return template.render(
        comparison=comparison,
        done=sum(cell.state == "done" for cell in comparison.cells),
        columns=comparison.metrics,
        rows=[(row, _cells(row, comparison.metrics)) for row in comparison.rows],
        pictures=[Markup(picture) for picture in _pictures(comparison)],
        environment=[(name, list(flat(value))) for name, value in comparison.environment.items()],
    )


def shown(metric: str, value: float) -> str:
    """Format a metric's value."""
    if metric == "bytes":
        return f"{count(value)}B"
    if metric.startswith("accuracy"):
        return percent(value)
    return count(value) if metric == "parameters" else number(value)


def _cells(row: Row, metrics: list[str]) -> list[Cell]:
    return [_cell(metric, row.values.get(metric), row.over_dense.get(metric), row) for metric in metrics]


def _cell(metric: str, value: Spread | None, over: Spread | None, row: Row) -> Cell:
    """Return the median; below it its ratio to the dense model's, and the range of that over the seeds."""
    if value is None:
        return Cell(ABSENT)
    if row.model == DENSE:
        return Cell(shown(metric, value.median), _range(shown(metric, value.low), shown(metric, value.high)))
    if over is None:
        return Cell(shown(metric, value.median))
    return Cell(shown(metric, value.median), times(over.median), _range(times(over.low), times(over.high)))


def _range(low: str, high: str) -> str:
    return "" if low == high else f"{low} to {high}"


def _pictures(comparison: Comparison) -> Iterator[str]:
    """Draw each text's perplexity, and the accuracy, over the size and over the speeds at the largest batch."""
    rows = [row for row in comparison.rows if row.model == CANDIDATE and row.done]
    for up in qualities(comparison.metrics):
        for across in costs(comparison.metrics):
            yield from _picture(rows, across, up)


def qualities(metrics: list[str]) -> Iterator[Axis]:
    """Yield the perplexity of each text, and the accuracy: the mean over the tasks if there are several."""
    yield from (Axis(metric) for metric in metrics if metric.startswith("perplexity "))
    # The mean over the tasks comes before them; a single task has none.
    yield from [Axis(metric, more_is_better=True) for metric in metrics if metric.startswith("accuracy")][:1]


def costs(metrics: list[str]) -> Iterator[Axis]:
    """Yield the size, and the speed of each phase at its largest batch."""
    yield Axis("bytes")
    # Batch sizes rise: the last metric of a phase is that of its largest batch.
    largest = {metric.split()[0]: metric for metric in metrics if " tok/s, batch " in metric}
    yield from (Axis(metric, more_is_better=True) for metric in largest.values())


def _picture(rows: list[Row], across: Axis, up: Axis) -> Iterator[str]:
    """Draw the rows that have both metrics, those of a recipe on one line; nothing if none has."""
    groups: dict[str, dict[str, tuple[Spread, Spread]]] = {}
    medians = {DENSE: (1.0, 1.0)}
    for row in rows:
        x, y = row.over_dense.get(across.metric), row.over_dense.get(up.metric)
        if x and y:
            groups.setdefault(row.recipe, {})[row.name] = (x, y)
            medians[row.name] = (x.median, y.median)
    if not groups:
        return
    x_sign, y_sign = (-1 if axis.more_is_better else 1 for axis in (across, up))
    best = undominated({name: (x_sign * x, y_sign * y) for name, (x, y) in medians.items()})
    yield figures.tradeoff(groups, best, x=across.label, y=up.label, summary=f"{up.label}, over {across.label}")
