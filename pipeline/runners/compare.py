"""Run a comparison: one run of the pipeline for each cell, which registers nothing.

On this machine the cells run one after the other; on a cluster one pipeline runs several side by side. Cells share every output
whose key is the same. A cell whose report is in the store is not run again, so that the same comparison started again continues
with the cells that are not finished.
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
from components.lib.settings import MlflowSettings
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
from pipeline.runners.progress import cells_displayed
from pipeline.runners.run import check, check_room, check_services, fetch_report, in_environment, run, to_store
from pipeline.runners.runner import ParallelRunner, Runner


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
        release: a folder, a GGUF file, an s3:// prefix, a Hub id with an optional @revision, or models:/name@alias.
        ratios: set as the ratio of every method; empty keeps the recipes' own.
        seeds: set as every seed of the recipes; empty keeps their own.
        home: the folder of all state.
        console: shows the progress.
        command: makes the comparison again, for the page.
        on: the runner of the stages.

    Raises:
        Refusal: an error that the user can correct and that every cell has.
    """
    planned = cells(recipes, ratios, seeds)
    _check(planned, release)
    if on.embeds:
        check_room([cell.recipe for cell in planned], release, home)
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
        # A cluster's stages may use an MLflow that this machine does not know.
        logged = bool(MlflowSettings().tracking_uri)
        if logged:
            runs.open_parent(self.label, {"sha256.release": self.comparison.release.digest}, {})
        self._take_measured()
        self._refuse()
        if isinstance(self.on, ParallelRunner):
            self._run_together(self.on)
        else:
            self._run_in_turn()
        self._leave()
        if logged:
            self._log()
        return Compared(self.comparison, self.folder)

    @property
    def _waiting(self) -> list[int]:
        """The cells that have not ended."""
        return [index for index, cell in enumerate(self.comparison.cells) if cell.state == "waiting"]

    def _take_measured(self) -> None:
        """Take the report of each cell that was measured before."""
        for index, cell in enumerate(self.comparison.cells):
            if self.store.read_text(f"runs/{cell.run}/report.json") is not None:
                self._end(index)
        done = len(self.planned) - len(self._waiting)
        if done:
            self.console.print(f"{done} of {len(self.planned)} cells were measured before", highlight=False)

    def _refuse(self) -> None:
        """Let each cell fail whose recipe cannot be applied to the release, before anything runs for it."""
        for index in self._waiting:
            try:
                pin_release(self.release, self.planned[index].recipe, self.store)
            except Unavailable:
                raise
            except Refusal as refusal:
                self._fail(index, refusal)

    def _run_in_turn(self) -> None:
        """Run one cell after the other."""
        left = _Left(len(self._waiting))
        psutil.cpu_percent()  # the first call begins the interval of the next one
        for index in self._waiting:
            cell = self.comparison.cells[index]
            behind = len(self.planned) - len(self._waiting)
            progress = [f"cell {behind + 1} of {len(self.planned)}", *self._failures, *left.shown(len(self._waiting))]
            self.console.print(f"{cell.name} ({', '.join([*progress, *_resources(self.home)])})", highlight=False)
            try:
                run(self.planned[index].recipe, self.release, None, self.home, self.console, cell.run, on=self.on)
            except Exception as error:  # the other cells go on
                self._fail(index, error)
            else:
                self._end(index)
            self._leave()

    def _run_together(self, on: ParallelRunner) -> None:
        """Run the cells side by side."""
        recipes = {self.comparison.cells[index].run: self.planned[index].recipe.to_yaml() for index in self._waiting}
        if not recipes:
            return
        left = _Left(len(self._waiting))
        with cells_displayed(self.console) as display:
            for news in on.run_cells(self.label, self.release, recipes, self.console):
                # Recipes with the same content are one run.
                for index in [index for index in self._waiting if self.comparison.cells[index].run == news.run]:
                    name = self.comparison.cells[index].name
                    if news.stage:
                        display.at(name, news.stage)
                        continue
                    if news.error:
                        self._fail(index, news.error)
                    else:
                        self._end(index)
                    behind = len(self.planned) - len(self._waiting)
                    progress = [f"{behind} of {len(self.planned)} cells", *self._failures]
                    how = self.comparison.cells[index].state
                    display.end(name, f"{how} ({', '.join([*progress, *left.shown(len(self._waiting))])})")
                if not news.stage:
                    self._leave()

    @property
    def _failures(self) -> list[str]:
        failed = len(self.comparison.failed)
        return [f"{failed} failed"] if failed else []

    def _end(self, index: int) -> None:
        """Take the report that a cell left in the store."""
        cell = self.comparison.cells[index]
        try:
            report = fetch_report(self.store, cell.run, self.home / "runs" / cell.run)
        except StageFailed as missing:
            self._fail(index, missing)
        else:
            self._finished(index, report)

    def _fail(self, index: int, error: Exception) -> None:
        cell = self.comparison.cells[index]
        told = isinstance(error, Refusal | StageFailed)
        reason = str(error) if told else f"{type(error).__name__}: {error}"
        self.console.print(f"{cell.name} failed: {reason}", highlight=False, markup=False)
        self._set(index, cell.model_copy(update={"state": "failed", "reason": reason}))

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


class _Left:
    """The time that the cells of a comparison still take, from the time that those before took."""

    def __init__(self, cells: int) -> None:
        self._cells = cells
        self._began = time.monotonic()

    def shown(self, waiting: int) -> list[str]:
        """Return the time for the cells that wait, in words; nothing before the first has ended and after the last."""
        ended = self._cells - waiting
        if not ended or not waiting:
            return []
        return [f"about {seconds((time.monotonic() - self._began) / ended * waiting)} left"]


def _check(planned: Sequence[Cell], release: str) -> None:
    """Raise Refusal if no cell can be run."""
    refusals = []
    for cell in planned:
        try:
            check(cell.recipe, release, None)
        except Refusal as refusal:
            refusals.append(refusal)
    if len(refusals) == len(planned):
        raise refusals[0]


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
