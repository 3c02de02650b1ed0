"""The result of a comparison: the numbers of every cell, and their median and range over the seeds."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from components.register.accuracy import accuracy, mean_accuracy
from components.register.measured import Measured, names, ratio
from components.register.report import Release

DENSE, CANDIDATE = "dense", "candidate"


class Result(BaseModel):
    """The outcome of one cell."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    ratio: float | None
    seed: int | None
    run: str
    """The label of its run; its report lies at `runs/<run>/`."""
    state: Literal["done", "failed", "waiting"] = "waiting"
    reason: str = ""
    """Why it failed."""
    removed: str = ""
    models: dict[str, Measured] = {}
    """dense, candidate, and the controls that the recipe asks for."""

    @property
    def name(self) -> str:
        """Return the cell in words, such as `trsp at 0.25, seed 1`."""
        ratio = "" if self.ratio is None else f" at {self.ratio:g}"
        return f"{self.recipe}{ratio}" + ("" if self.seed is None else f", seed {self.seed}")


class Spread(NamedTuple):
    """Values over the seeds."""

    median: float
    low: float
    high: float


class Row(NamedTuple):
    """One model of one recipe and ratio, over the seeds."""

    recipe: str
    """Empty for the dense model."""
    ratio: float | None
    model: str
    done: int
    cells: int
    values: dict[str, Spread]
    """By the metric's name."""
    over_dense: dict[str, Spread]
    """The ratio to the dense model of the same cell, measured in the same process."""

    @property
    def name(self) -> str:
        """Return the recipe with its ratio; `dense` for the dense model."""
        return f"{self.recipe}{'' if self.ratio is None else f' {self.ratio:g}'}" or DENSE


class Comparison(BaseModel):
    """Every cell of a comparison."""

    model_config = ConfigDict(frozen=True)

    release: Release
    command: str
    """Makes the comparison again."""
    recipes: dict[str, str]
    """The YAML of each recipe, before ratios and seeds are set."""
    cells: tuple[Result, ...]
    environment: dict[str, Any] = {}
    """Library versions, hardware, context length and data digests of the first cell that was measured."""

    @property
    def failed(self) -> list[Result]:
        """Return the cells that failed."""
        return [cell for cell in self.cells if cell.state == "failed"]

    @property
    def rows(self) -> list[Row]:
        """Return the dense model's row, then for each recipe and ratio the candidate's row and those of its controls."""
        done = [cell for cell in self.cells if cell.state == "done"]
        rows = [_row("", None, DENSE, done, len(self.cells))] if done else []
        for recipe, part in sorted({(cell.recipe, cell.ratio) for cell in self.cells}, key=self._place):
            cells = [cell for cell in self.cells if (cell.recipe, cell.ratio) == (recipe, part)]
            measured = [cell for cell in cells if cell.state == "done"]
            models = [name for name in names(cell.models for cell in measured) if name != DENSE] or [CANDIDATE]
            rows += [_row(recipe, part, model, measured, len(cells)) for model in models]
        return rows

    @property
    def metrics(self) -> list[str]:
        """Return the name of every metric that a row has."""
        return names(row.values for row in self.rows)

    def _place(self, key: tuple[str, float | None]) -> tuple[int, float]:
        return list(self.recipes).index(key[0]), key[1] or 0.0

    def to_json(self) -> str:
        """Return strict JSON: the cells with all their numbers, and the rows."""
        written = self.model_dump(mode="json") | {"rows": [_plain(row) for row in self.rows]}
        return json.dumps(written, indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return one line for each measured model of each cell, and one for each cell that has none."""
        lines = [line for cell in self.cells for line in _lines(cell)]
        out = io.StringIO()
        writer = csv.DictWriter(out, names(lines), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()


def metrics(model: Measured) -> dict[str, float]:
    """Return every measured number of a model by its name, such as `perplexity test` or `decode tok/s, batch 1`."""
    found: dict[str, float | None] = {"parameters": float(model.parameters), "bytes": float(model.bytes)}
    found |= {f"perplexity {text}": value for text, value in model.perplexity.items()}
    tasks = {task: one.value for task, scores in model.tasks.items() if (one := accuracy(scores))}
    mean = mean_accuracy(model.tasks, tasks) if len(tasks) > 1 else None
    found |= {f"accuracy, mean of {len(tasks)} tasks": mean.value} if mean else {}
    found |= {f"accuracy {task}": value for task, value in tasks.items()}
    for phase, batches in model.speed.items():
        found |= {f"{phase} tok/s, batch {batch}": speed.tokens_per_second for batch, speed in batches.items()}
    return {name: value for name, value in found.items() if value is not None}


def undominated(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of the points (x, y), less of both being better, that no other point beats in one without losing in the other."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(
            other_x <= x and other_y <= y and (other_x, other_y) != (x, y) for other_x, other_y in points.values()
        )
    }


def _row(recipe: str, part: float | None, model: str, cells: Sequence[Result], total: int) -> Row:
    pairs = [(metrics(cell.models[model]), metrics(cell.models[DENSE])) for cell in cells if model in cell.models]
    known = names(own for own, _ in pairs)
    return Row(
        recipe,
        part,
        model,
        len(pairs),
        total,
        _spreads(known, lambda name: (own.get(name) for own, _ in pairs)),
        _spreads(known, lambda name: (ratio(own.get(name), dense.get(name)) for own, dense in pairs)),
    )


def _spreads(known: Iterable[str], values: Callable[[str], Iterable[float | None]]) -> dict[str, Spread]:
    found = {name: [value for value in values(name) if value is not None] for name in known}
    return {name: Spread(statistics.median(some), min(some), max(some)) for name, some in found.items() if some}


def _plain(row: Row) -> dict[str, Any]:
    spreads = {name: spread._asdict() for name, spread in row.values.items()}
    over = {name: spread._asdict() for name, spread in row.over_dense.items()}
    return row._asdict() | {"values": spreads, "over_dense": over}


def _lines(cell: Result) -> Iterator[dict[str, Any]]:
    own = {"recipe": cell.recipe, "ratio": cell.ratio, "seed": cell.seed, "state": cell.state, "reason": cell.reason}
    own |= {"run": cell.run, "removed": cell.removed}
    if not cell.models:
        yield own | {"model": ""}
    for name, model in cell.models.items():
        yield own | {"model": name} | metrics(model)
