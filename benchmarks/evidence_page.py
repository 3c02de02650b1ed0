"""Write docs/evidence.md from the figures of `python -m benchmarks.evidence` in benchmarks/figures/evidence-*.json.

python -m benchmarks.evidence_page
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.register.accuracy import accuracy, judged_tasks, mean_accuracy

FIGURES = Path(__file__).parent / "figures"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"

OURS = ("seam", "trsp", "dress")
"""The recipes that the others are peers of."""

INTRODUCTION = """\
# The evidence

*Written by `python -m benchmarks.evidence_page` from the figures in `benchmarks/figures`, which the command above each table makes:
change those, not this page.*

A real language model, every method at the same budget. Every seed draws its own calibration windows, on which a recipe's method chooses and its transfer
fits; the training behind it has the same tokens, steps, objective and parameters for all. A **control** is cut first and gets the same training without a
transfer. Perplexity is measured on texts that nothing was chosen or trained on, in windows of the training's length.

A cell is the median over the seeds, with the least and the greatest in brackets if there are several. A ratio is taken seed by seed before its median: below 1
the candidate is better. Accuracy is the mean over the tasks, normalised by length if a task has that metric, of one seed.
docs/methods.md describes the methods. A row or a seed that is missing is not measured yet: the command above the table goes on with it.
"""


@dataclass(frozen=True)
class Table:
    """The figures of one command, by recipe, ratio and seed."""

    conditions: Mapping[str, Any]
    figures: Mapping[str, Any]

    @property
    def dense(self) -> Mapping[str, Any]:
        """Return the dense model's figures."""
        return self.figures["dense"]

    @property
    def texts(self) -> list[str]:
        """Return the names of the texts."""
        return list(self.conditions["tokens"])

    @property
    def tasks(self) -> list[str]:
        """Return the names of the tasks."""
        return judged_tasks(self.dense.get("tasks", {}))

    def _parts(self) -> Iterator[tuple[str, str, str, str]]:
        for name in self.figures:
            kind, *place = name.split("/")
            if len(place) == 3:
                yield kind, place[0], place[1], place[2]

    @property
    def ratios(self) -> list[str]:
        """Return the ratios that there are figures of, ascending."""
        return sorted({ratio for kind, _, ratio, _ in self._parts() if kind != "choice"}, key=float)

    @property
    def recipes(self) -> list[str]:
        """Return the recipes, ours first, the others in the order of the alphabet."""
        found = {recipe for kind, recipe, _, _ in self._parts() if kind != "choice"}
        return sorted(found, key=lambda recipe: (recipe not in OURS, recipe))

    def seeds(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """Return the figures below a prefix by seed."""
        return {
            name.rsplit("/", 1)[1]: figure for name, figure in self.figures.items() if name.rsplit("/", 1)[0] == prefix
        }

    def removed(self, recipe: str, ratio: str) -> str:
        """Return what a recipe chose on the first seed, if it chose layers."""
        chosen = next(iter(self.seeds(f"choice/{recipe}/{ratio}").values()), {})
        return ", ".join(map(str, sorted(chosen.get("removed", []))))


def cell(values: Sequence[float], form: str) -> str:
    """Return the median, with the least and the greatest of several; empty if there is none."""
    if not values:
        return ""
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def page() -> str:
    """Return docs/evidence.md."""
    found = [Table(**json.loads(path.read_text())) for path in sorted(FIGURES.glob("evidence-*.json"), reverse=True)]
    return "\n".join([INTRODUCTION, *(line for table in found for line in _section(table))])


def _section(table: Table) -> Iterator[str]:
    arguments = table.conditions["arguments"]
    calibration = table.conditions["calibration"]
    steps = table.conditions["steps"]
    yield f"## {table.conditions['title']}\n"
    yield (
        f"Chosen, fitted and trained on {calibration}: {arguments['samples']} windows of {arguments['length']} tokens, {steps}. Versions: "
        + ", ".join(f"{name} {version}" for name, version in table.conditions["versions"].items())
        + ".\n"
    )
    yield f"    {table.conditions['command']}\n"
    for ratio in table.ratios:
        yield from _table(table, ratio)
        yield from _comparisons(table, ratio)


def _table(table: Table, ratio: str) -> Iterator[str]:
    heads = [*table.texts, *(["accuracy, %"] if table.tasks else []), "seeds"]
    yield f"| ratio {ratio} | " + " | ".join(heads) + " |"
    yield "|---|" + "---|" * len(heads)
    yield _row(table, "dense", {"": table.dense})
    trained = table.seeds("dense-trained")
    if trained:
        yield _row(table, "dense, the same training", trained)
    for kind, title in (
        ("transfer", "`{}`, no training"),
        ("candidate", "`{}`, trained"),
        ("control", "control of `{}`"),
    ):
        for recipe in table.recipes:
            found = table.seeds(f"{kind}/{recipe}/{ratio}")
            if found:
                yield _row(table, title.format(recipe), found)
    yield ""


def _row(table: Table, title: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    cells = [cell([figure[text] for figure in found.values()], ".1f") for text in table.texts]
    if table.tasks:
        means = [mean for figure in found.values() if (mean := mean_accuracy(figure.get("tasks", {}), table.tasks))]
        cells.append(cell([100 * mean.value for mean in means], ".1f"))
    return f"| {title} | " + " | ".join([*cells, str(len(found))]) + " |"


def _comparisons(table: Table, ratio: str) -> Iterator[str]:
    """Yield a table of ratios: each of ours over its control and over the best of the others, text by text."""
    rows: list[str | None] = []
    for recipe in (recipe for recipe in table.recipes if recipe in OURS):
        rows.append(
            _ratios(
                table, f"`{recipe}`, trained / its control", f"candidate/{recipe}/{ratio}", f"control/{recipe}/{ratio}"
            )
        )
        for kind, how in (("candidate", "trained"), ("transfer", "no training")):
            for peer in (peer for peer in table.recipes if peer not in OURS):
                rows.append(
                    _ratios(
                        table, f"`{recipe}` / `{peer}`, {how}", f"{kind}/{recipe}/{ratio}", f"{kind}/{peer}/{ratio}"
                    )
                )
    found = [row for row in rows if row]
    if found:
        yield f"| ratio {ratio} | " + " | ".join([*table.texts, "seeds"]) + " |"
        yield "|---|" + "---|" * (len(table.texts) + 1)
        yield from found
        yield ""
    yield from _by_task(table, ratio)
    chosen = [f"`{recipe}` {layers}" for recipe in table.recipes if (layers := table.removed(recipe, ratio))]
    if chosen:
        yield "Layers removed on the first seed: " + "; ".join(chosen) + ".\n"


def _ratios(table: Table, title: str, above: str, below: str) -> str | None:
    one, other = table.seeds(above), table.seeds(below)
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return None
    cells = [cell([one[seed][text] / other[seed][text] for seed in seeds], ".3f") for text in table.texts]
    return f"| {title} | " + " | ".join([*cells, str(len(seeds))]) + " |"


def _by_task(table: Table, ratio: str) -> Iterator[str]:
    """Yield the accuracy by task, with the standard error of one task's."""
    kinds = [(f"`{recipe}`, trained", f"candidate/{recipe}/{ratio}") for recipe in table.recipes]
    kinds += [(f"control of `{recipe}`", f"control/{recipe}/{ratio}") for recipe in table.recipes]
    scored: dict[str, Any] = {"dense": table.dense.get("tasks", {})}
    scored |= {
        title: figure["tasks"]
        for title, prefix in kinds
        for figure in table.seeds(prefix).values()
        if "tasks" in figure
    }
    if not table.tasks or len(scored) == 1:
        return
    yield (
        f"| ratio {ratio}, accuracy, % | "
        + " | ".join(task.removeprefix("local_") for task in table.tasks)
        + " | mean |"
    )
    yield "|---|" + "---|" * (len(table.tasks) + 1)
    for title, tasks in scored.items():
        each = [accuracy(tasks.get(task)) for task in table.tasks]
        cells = [f"{100 * one.value:.1f} ± {100 * (one.error or 0):.1f}" if one else "" for one in each]
        mean = mean_accuracy(tasks, table.tasks)
        yield (
            f"| {title} | "
            + " | ".join([*cells, f"{100 * mean.value:.1f} ± {100 * (mean.error or 0):.1f}" if mean else ""])
            + " |"
        )
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page())
