"""Run a comparison on this machine: one run of the pipeline for each cell, which registers nothing.

Cells share every output whose key is the same. A cell whose report is in the store is not run again, so that the same comparison
started again continues with the first cell that is not finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from components.lib.errors import Refusal, StageFailed, Unavailable
from components.lib.recipe.schema import Recipe
from components.lib.stage.code import code_of_everything
from components.lib.stage.declaration import declared_stages
from components.lib.store.store import Reference, Store
from components.lib.tracking import runs
from components.lib.transformer.removal import in_words
from components.pin.pin import pin_files, pin_release
from components.register.format import count, seconds
from components.register.report import Release, Report
from pipeline.compare.cells import Cell, cells
from pipeline.compare.comparison import Comparison, Result
from pipeline.compare.page import render
from pipeline.runners.local import LocalRunner
from pipeline.runners.run import check, check_room, check_services, fetch_report, in_environment, run, to_store
from pipeline.runners.runner import Runner


@dataclass(frozen=True)
class Compared:
    """A comparison, and the folder of its files on this machine."""

    comparison: Comparison
    folder: Path
    """Holds comparison.html, comparison.csv and comparison.json."""


def compare(
    recipes: Mapping[str, Recipe],
    release: str,
    ratios: Sequence[float],
    seeds: Sequence[int],
    home: Path,
    console: Console,
    command: str,
    on: Runner = LocalRunner(),  # noqa: B008  # it is immutable
) -> Compared:
    """Measure every recipe with every ratio and every seed on one release.

    A cell that fails is recorded with its reason, and the others go on. The page is written after each cell.

    Args:
        recipes: by name, with their texts not yet in the store.
        release: a folder, an s3:// prefix, a Hub id with an optional @revision, or models:/name@alias.
        ratios: set as the ratio of every method; empty keeps the recipes' own.
        seeds: set as every seed of the recipes; empty keeps their own.
        home: the folder of all state.
        console: shows the progress.
        command: makes the comparison again, for the page.
        on: the runner of the stages: one that reaches this machine's services.

    Raises:
        Refusal: an error that the user can correct and that every cell has.
    """
    planned = cells(recipes, ratios, seeds)
    _check(planned, release, home)
    check_services()
    with on.services(home) as environment, in_environment(environment):
        store = Store.from_environment()
        check_services()
        pinned = {name: pin_files(recipe, store) for name, recipe in recipes.items()}
        planned = cells(pinned, ratios, seeds)
        reference = _pinned(release, planned, store)
        made = store.manifest(reference).metadata
        comparison = Comparison(
            release=Release(source=made["source"], revision=made["revision"], digest=reference.digest),
            command=command,
            recipes={name: recipe.to_yaml() for name, recipe in recipes.items()},
            cells=tuple(
                Result(recipe=cell.name, ratio=cell.ratio, seed=cell.seed, run=_label(cell, reference))
                for cell in planned
            ),
        )
        return _Comparing(comparison, str(reference), planned, home, console, on, store).all()


@dataclass
class _Comparing:
    """A comparison in progress."""

    comparison: Comparison
    release: str
    planned: Sequence[Cell]
    home: Path
    console: Console
    on: Runner
    store: Store

    @property
    def label(self) -> str:
        """The comparison's label, by its cells."""
        return f"comparison-{_digest([cell.run for cell in self.comparison.cells])}"

    @property
    def folder(self) -> Path:
        return self.home / "comparisons" / self.label

    def all(self) -> Compared:
        """Run the cells that have no report yet, and leave the page."""
        runs.open_parent(self.label, {"sha256.release": self.comparison.release.digest}, {})
        waiting = []
        for index, cell in enumerate(self.comparison.cells):
            if self.store.read_text(f"runs/{cell.run}/report.json") is None:
                waiting.append(index)
            else:
                self._finished(index, fetch_report(self.store, cell.run, self.home / "runs" / cell.run))
        done = len(self.planned) - len(waiting)
        if done:
            self.console.print(f"{done} of {len(self.planned)} cells were measured before", highlight=False)
        began = time.monotonic()
        psutil.cpu_percent()  # the first call begins the interval of the next one
        for worked, index in enumerate(waiting):
            left = (time.monotonic() - began) / worked * (len(waiting) - worked) if worked else None
            self._announce(index, done + worked, left)
            self._run(index)
            self._leave()
        self._leave()
        self._log()
        return Compared(self.comparison, self.folder)

    def _announce(self, index: int, behind: int, left: float | None) -> None:
        failed = len(self.comparison.failed)
        progress = [f"cell {behind + 1} of {len(self.planned)}"]
        progress += [f"{failed} failed"] if failed else []
        progress += [f"about {seconds(left)} left"] if left is not None else []
        self.console.print(
            f"{self.comparison.cells[index].name} ({', '.join([*progress, *_resources(self.home)])})", highlight=False
        )

    def _run(self, index: int) -> None:
        cell = self.comparison.cells[index]
        try:
            result = run(self.planned[index].recipe, self.release, None, self.home, self.console, cell.run, on=self.on)
        except Exception as error:  # the other cells go on
            told = isinstance(error, Refusal | StageFailed)
            reason = str(error) if told else f"{type(error).__name__}: {error}"
            self.console.print(f"{cell.name} failed: {reason}", highlight=False, markup=False)
            self._set(index, cell.model_copy(update={"state": "failed", "reason": reason}))
        else:
            self._finished(index, result.report)

    def _finished(self, index: int, report: Report) -> None:
        found = {"state": "done", "removed": in_words(report.removals()), "models": report.models()}
        self._set(index, self.comparison.cells[index].model_copy(update=found))
        if not self.comparison.environment:
            self.comparison = self.comparison.model_copy(update={"environment": report.environment})

    def _set(self, index: int, result: Result) -> None:
        changed = [*self.comparison.cells]
        changed[index] = result
        self.comparison = self.comparison.model_copy(update={"cells": tuple(changed)})

    @property
    def files(self) -> dict[str, str]:
        """The comparison's files by name."""
        one = self.comparison
        return {
            "comparison.html": render(one),
            "comparison.csv": one.to_csv(),
            "comparison.json": one.to_json(),
        }

    def _leave(self) -> None:
        """Write the files here and into the store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (self.folder / name).write_text(text)
            self.store.write_text(f"comparisons/{self.label}/{name}", text)

    def _log(self) -> None:
        """Log the files to MLflow, with the number of cells by state."""
        states = [cell.state for cell in self.comparison.cells]
        runs.leave_report(self.label, self.files, {state: float(states.count(state)) for state in ("done", "failed")})
        runs.close_parent(self.label, succeeded="failed" not in states)


def _check(planned: Sequence[Cell], release: str, home: Path) -> None:
    """Raise Refusal if no cell can be run, or the disk has no room for all."""
    refusals = []
    for cell in planned:
        try:
            check(cell.recipe, release, None)
        except Refusal as refusal:
            refusals.append(refusal)
    if len(refusals) == len(planned):
        raise refusals[0]
    check_room([cell.recipe for cell in planned], release, home)


def _pinned(release: str, planned: Sequence[Cell], store: Store) -> Reference:
    """Put the release into the store, checked against the first cell that can be applied to it, and return its reference."""
    refusals = []
    for cell in planned:
        try:
            return pin_release(to_store(release, cell.recipe, store), cell.recipe, store)
        except Unavailable:
            raise
        except Refusal as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _label(cell: Cell, release: Reference) -> str:
    """Return the label of a cell's run: by everything that its numbers depend on."""
    stages = declared_stages().values()
    libraries = sorted({one for stage in stages for one in stage.code(cell.recipe).libraries.items()})
    return f"compare-{_digest([release.digest, cell.recipe.to_yaml(), code_of_everything(), libraries])}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _resources(home: Path) -> list[str]:
    """Return the use of processors, memory and disk since the last call."""
    memory = psutil.virtual_memory()
    return [
        f"processors {psutil.cpu_percent():.0f} %",
        f"memory {count(memory.total - memory.available)}B of {count(memory.total)}B",
        f"disk {count(shutil.disk_usage(home).free)}B free",
    ]
