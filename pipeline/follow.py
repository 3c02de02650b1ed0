"""What a person sees of a run: which stage of how many, a bar with time left inside the long ones, and nothing else.

The stages print lines that begin with `EVENT`; whatever else they and their frameworks print goes to the log file.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from components.stage import EVENT

FINISHED = {"reused": "made before", "skipped": "not asked for", "done": "done"}


class Follower(io.TextIOBase):
    """Stands in for standard output while a pipeline runs: shows the stages' events, and writes all else to the log."""

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
        self.bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )

    def write(self, text: str) -> int:
        """Take what is printed, and act on it line by line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            # kfp.local indents what the stages print.
            if line.lstrip().startswith(EVENT):
                self._take(json.loads(line.lstrip().removeprefix(EVENT)))
            self._log.write(line + "\n")
        return len(text)

    def close_log(self) -> None:
        """Write out what is left and close the log file."""
        self._log.write(self._rest)
        self._log.close()

    def _take(self, event: dict[str, Any]) -> None:
        stage, kind = event["stage"], event["event"]
        if stage not in self._seen:
            self._seen.append(stage)
            self._rows[stage] = self.bars.add_task(self._title(stage), total=None, shown="")
        if kind == "progress":
            shown = "  ".join(f"{name} {value:.4g}" for name, value in event["shown"].items())
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
        self.bars.update(self._rows[stage], completed=1, total=1, shown=shown)
        if not self._console.is_terminal:
            self._console.print(f"{self._title(stage)}: {shown}", highlight=False)

    def _title(self, stage: str) -> str:
        return f"[{self._seen.index(stage) + 1:>2}/{self._stages}] {stage.replace('_', ' ')}".replace("[", r"\[", 1)


@contextlib.contextmanager
def following(log: Path, stages: int, console: Console) -> Iterator[Follower]:
    """Show a pipeline's progress on the console while the block runs; everything printed meanwhile goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    follower = Follower(log, stages, console)
    # The bars are drawn on the console's own stream, which must not be the one that is taken over.
    with follower.bars, contextlib.redirect_stdout(follower), contextlib.redirect_stderr(follower):
        try:
            yield follower
        finally:
            sys.stdout.flush()
            follower.close_log()
