"""Run the pipeline, or the cells of a comparison, on a Kubeflow cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console

from components.lib.errors import Refusal, StageFailed
from components.lib.stage.events import EVENT
from components.lib.store.runs import Ending, ending, failure, forget, newest_stage
from components.lib.store.store import Store
from pipeline.compare.pipeline import AT_MOST
from pipeline.runners.progress import displayed
from pipeline.runners.runner import CellNews, task_names

if TYPE_CHECKING:
    from pipeline.kubeflow.profile import Profile

CELLS_BYTES = 100_000
"""The most that the cells of one run take as JSON: Kubeflow hands the parameters to its driver as one argument of a command, and
Linux takes arguments of 131,072 bytes."""


@dataclass(frozen=True)
class KubeflowRunner:
    """A cluster with Kubeflow Pipelines."""

    profile: Profile
    mutable: bool = False
    """Whether the image may be named by a tag."""
    pause: float = 5.0
    """Seconds between two requests for the run's state."""
    parallel: int = AT_MOST
    """How many cells of a comparison run side by side."""
    embeds: ClassVar[bool] = False

    @contextmanager
    def services(self, home: Path) -> Iterator[Mapping[str, str]]:
        """Return the environment that names the profile's store. No service is embedded: a cluster cannot reach this machine's loopback."""
        from pipeline.kubeflow.profile import variables

        self.profile.pinned_image(self.mutable)
        yield variables(self.profile, os.environ)

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        """Upload the pipeline if the server does not have it, start a run of it, and follow it to its end."""
        from pipeline.kubeflow.client import KubeflowClient, failed_task, succeeded
        from pipeline.kubeflow.compile import compile_pipeline
        from pipeline.recompress import recompress

        server = KubeflowClient(self.profile.kubeflow)
        version = server.upload(recompress.name, compile_pipeline(recompress, self.profile, self.mutable))
        run = server.start(version, arguments["run"], arguments, self.profile)
        console.print(f"On Kubeflow: {run.address}", highlight=False, soft_wrap=True)
        tasks = task_names(recompress)
        with displayed(log, len(tasks), console) as display:

            def show(task: str, event: str, seconds: float | None) -> None:
                # The server reports its drivers and handlers too.
                if task in tasks:
                    shown = {"stage": task, "event": event, "seconds": seconds}
                    display.write(f"{EVENT}{json.dumps(shown)}\n")

            ended = server.follow(run, show, self.pause)
        if not succeeded(ended):
            state = f"{failed_task(ended) or 'the run'} {str(ended.state).lower()}"
            raise _failure(arguments["run"], state, run.address)

    def run_cells(self, label: str, release: str, recipes: Mapping[str, str], console: Console) -> Iterator[CellNews]:
        """Run the cells as one pipeline, and yield a cell's news when its stages leave them in the store.

        A run of the same comparison that is still going on is followed to its end first. Argo starts no further cell of a loop
        after one of its cells failed, and a run takes a limited number of bytes: so the cells that did not begin are submitted
        again, as long as each run ends at least one cell and nobody cancels it.
        """
        from pipeline.compare.pipeline import compare_pipeline
        from pipeline.kubeflow.client import ENDED, KubeflowClient
        from pipeline.kubeflow.compile import compile_pipeline, configured_for_cluster
        from pipeline.recompress import recompress

        pipeline = compare_pipeline(self.parallel, configured_for_cluster(recompress, self.profile, self.mutable))
        server = KubeflowClient(self.profile.kubeflow)
        version = server.upload(pipeline.name, compile_pipeline(pipeline, self.profile, self.mutable))
        store = Store.from_environment()
        waiting = dict(recipes)
        run = server.running(label)
        while waiting:
            if run is None:
                cells = _fitting(waiting)
                for cell in cells:
                    forget(cell["run"], store)
                run = server.start(version, label, {"release": release, "cells": cells}, self.profile)
            console.print(f"On Kubeflow: {run.address}", highlight=False, soft_wrap=True)
            followed = _Followed([cell["run"] for cell in run.arguments["cells"]], run.address, store)
            for seen in server.looks(run, self.pause):
                yield from followed.news(last=seen.state in ENDED)
            waiting = {cell: recipe for cell, recipe in waiting.items() if cell not in followed.ended}
            if not followed.ended or seen.state == "CANCELED":
                reason = f"the run {str(seen.state).lower()} before the cell ended ({run.address})"
                yield from (CellNews(cell, error=StageFailed(reason)) for cell in waiting)
                return
            run = None


def _fitting(recipes: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the first cells as the pipeline takes them, as many as one run takes and at least one."""
    cells: list[dict[str, str]] = []
    size = 0
    for run, recipe in recipes.items():
        cell = {"recipe": recipe, "run": run}
        size += len(json.dumps(cell).encode())
        if cells and size > CELLS_BYTES:
            break
        cells.append(cell)
    return cells


class _Followed:
    """The cells of one run on the server, as the store shows them."""

    def __init__(self, cells: Sequence[str], address: str, store: Store) -> None:
        self.ended: set[str] = set()
        self._cells = cells
        self._address = address
        self._store = store
        self._stages: dict[str, str] = {}

    def news(self, last: bool) -> Iterator[CellNews]:
        """Yield the news since the last call: each stage that began, and each cell that ended."""
        for cell in self._cells:
            if cell in self.ended:
                continue
            stage = newest_stage(cell, self._store)
            if stage != self._stages.get(cell, ""):
                self._stages[cell] = stage
                yield CellNews(cell, stage)
            if end := self._end(cell, last):
                self.ended.add(cell)
                yield end

    def _end(self, cell: str, last: bool) -> CellNews | None:
        """Return the end of a cell; None if it runs, or did not begin before the run ended.

        The exit handler of the cell records the end. If it could not, a report or a failure counts after the last look.
        """
        end = ending(cell, self._store) or (failure(cell, self._store) if last else None)
        if (end or last) and self._store.read_text(f"runs/{cell}/report.json") is not None:
            return CellNews(cell)
        return CellNews(cell, error=_error(end, self._address)) if end else None


def _failure(label: str, state: str, address: str) -> Refusal | StageFailed:
    """Return the error that the failed stage left in the store, or else the state that Kubeflow reports."""
    left = failure(label, Store.from_environment())
    return _error(left, address) if left else StageFailed(f"{state} ({address})")


def _error(end: Ending, address: str) -> Refusal | StageFailed:
    """Return the end of a run that left no report as an error."""
    if end.lasting:
        return Refusal(end.reason)
    reason = end.reason or "the run left no report"
    return StageFailed(f"{f'{end.stage}: ' if end.stage else ''}{reason} ({address})")
