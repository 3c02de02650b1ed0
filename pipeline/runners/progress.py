"""Show a run's progress on the console: a row for each stage, with a bar and the time left for the long ones.

The stages print lines that begin with `EVENT`; everything else that they and their frameworks print is written to the log file.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from components.lib.stage.events import EVENT
from components.lib.training.journal import Journal

FINISHED = {"reused": "made before", "skipped": "not asked for", "done": "done"}


class ProgressDisplay(io.TextIOBase):
    """Replaces standard output while a pipeline runs: shows the stages' events, and writes everything to the log."""

    def __init__(self, log: Path, stages: int, console: Console) -> None:
        self.refused: str | None = None
        self.failed: str | None = None
        self._log = log.open("a", buffering=1)
        self._stages = stages
        self._console = console
        self._rest = ""
        self._seen: list[str] = []
        self._rows: dict[str, TaskID] = {}
        self._ended: set[str] = set()
        self.bars = _bars(console)

    @property
    def silent(self) -> str | None:
        """The last stage that began, if it has told no end."""
        last = self._seen[-1] if self._seen else None
        return None if last in self._ended else last

    def write(self, text: str) -> int:
        """Handle printed text, line by line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if event := _event(line):
                self._take(event)
            self._log.write(line + "\n")
        return len(text)

    def close_log(self) -> None:
        """Write the last, unfinished line and close the log file."""
        self._log.write(self._rest)
        self._log.close()

    def _take(self, event: dict[str, Any]) -> None:
        stage, kind = event["stage"], event["event"]
        if stage not in self._seen:
            self._seen.append(stage)
            self._rows[stage] = self.bars.add_task(self._title(stage), total=None, shown="")
        if kind == "progress":
            shown = _numbers(event["shown"])
            self.bars.update(self._rows[stage], completed=event["done"], total=event["total"], shown=shown)
        elif kind in FINISHED and stage not in self._ended:
            self._end(stage, FINISHED[kind], event.get("seconds"))
        elif kind == "refused":
            self.refused = event["message"]
        elif kind == "failed":
            self.failed = self.failed or f"{stage}: {event['message']}"

    def _end(self, stage: str, how: str, seconds: float | None) -> None:
        self._ended.add(stage)
        shown = f"{how} in {seconds:.1f} s" if seconds is not None else how
        _finish(self.bars, self._rows[stage], shown, self._console)

    def _title(self, stage: str) -> str:
        return escape(f"[{self._seen.index(stage) + 1:>2}/{self._stages}] {stage.replace('_', ' ')}")


@contextlib.contextmanager
def displayed(log: Path, stages: int, console: Console) -> Iterator[ProgressDisplay]:
    """Show a pipeline's progress on the console while the block runs; everything printed meanwhile is written to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    display = ProgressDisplay(log, stages, _held(console))
    with display.bars, contextlib.redirect_stdout(display), contextlib.redirect_stderr(display):
        try:
            yield display
        finally:
            sys.stdout.flush()
            display.close_log()


class CellsDisplay:
    """A row for each cell of a comparison that runs: its newest stage, then its end."""

    def __init__(self, bars: Progress, console: Console) -> None:
        self._bars, self._console = bars, console
        self._rows: dict[str, TaskID] = {}

    def at(self, cell: str, stage: str) -> None:
        """Show the stage that began."""
        self._bars.update(self._row(cell), shown=stage)

    def end(self, cell: str, how: str) -> None:
        """Show the cell's end, which is one line if the console is no terminal."""
        _finish(self._bars, self._row(cell), how, self._console)

    def _row(self, cell: str) -> TaskID:
        if cell not in self._rows:
            self._rows[cell] = self._bars.add_task(escape(cell), total=None, shown="")
        return self._rows[cell]


@contextlib.contextmanager
def cells_displayed(console: Console) -> Iterator[CellsDisplay]:
    """Show the cells of a comparison on the console while the block runs."""
    with _bars(console) as bars:
        yield CellsDisplay(bars, console)


class Bar:
    """A journal for work in this process, shown as a bar."""

    def __init__(self, bars: Progress, row: TaskID) -> None:
        self._bars, self._row = bars, row

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Ignore the metrics: the progress event carries those to show."""

    def progress(self, done: int, total: int, **shown: float) -> None:
        """Move the bar, with a few numbers beside it."""
        self._bars.update(self._row, completed=done, total=total, shown=_numbers(shown))


@contextlib.contextmanager
def bar(title: str, console: Console) -> Iterator[Journal]:
    """Show one bar while the block works; if the console is no terminal, one line when it is done."""
    began = time.perf_counter()
    with _bars(console) as bars:
        row = bars.add_task(escape(title), total=None, shown="")
        yield Bar(bars, row)
        _finish(bars, row, f"done in {time.perf_counter() - began:.1f} s", console)


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )


def _finish(bars: Progress, row: TaskID, shown: str, console: Console) -> None:
    """Fill the bar; print a line instead if the console is no terminal."""
    bars.update(row, completed=1, total=1, shown=shown)
    if not console.is_terminal:
        title = next(task.description for task in bars.tasks if task.id == row)
        console.print(f"{title}: {shown}", highlight=False)


def _numbers(shown: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


def _event(line: str) -> dict[str, Any] | None:
    """Return the event in the line, or None. kfp's indent or a framework's unfinished bar may precede it."""
    _, marked, text = line.partition(EVENT)
    try:
        return json.JSONDecoder().raw_decode(text)[0] if marked else None
    except ValueError:
        return None


def _held(console: Console) -> Console:
    """Return a copy of the console bound to its present stream: the original looks up `sys.stdout`, which is about to be replaced."""
    held = copy.copy(console)
    held.file = console.file
    return held
