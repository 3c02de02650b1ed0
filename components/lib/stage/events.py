"""Events that tell a progress display how far a stage is.

    with reported("register", run) as events:
        events.emit("progress", done=1, total=2, shown={})
        events.finish("done", verdict="pass")

A stage prints each event as a line of standard output. Every block emits `opened` first and exactly one end: `done`, `reused`,
`skipped`, `refused` or `failed`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from components.lib.errors import Refusal, of_machine
from components.lib.store.runs import leave_failure, leave_stage

EVENT = "@espalier "
"""The prefix of a line of standard output that holds an event; the rest of the line is JSON."""


class EventSink(Protocol):
    """Receives a stage's events."""

    def __call__(self, event: str, **details: Any) -> None: ...


class StageEvents:
    """The events of one run of a stage, and the time since it was opened."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.ended = False
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the stage was opened."""
        return time.perf_counter() - self._began

    def emit(self, event: str, **details: Any) -> None:
        """Print one event. This method is an `EventSink`."""
        print(EVENT + json.dumps({"stage": self.label, "event": event, **details}), flush=True)

    def finish(self, event: str = "done", **details: Any) -> None:
        """Emit the event that ends the stage, once: a later call does nothing. `done` tells the seconds it took."""
        if self.ended:
            return
        self.ended = True
        timing = {"seconds": round(self.seconds, 1)} if event == "done" else {}
        self.emit(event, **timing, **details)


@contextmanager
def reported(label: str, run: str = "") -> Iterator[StageEvents]:
    """Report a block of work: `opened`, then `done` with its seconds unless the block itself calls `finish`.

    An error is reported as `refused` or `failed` and raised again; one of the machine, such as a full disk, is `refused`. The beginning and an error are also kept in the store, because
    nobody reads a pod's standard output on a cluster.

    Args:
        label: the stage's name as the progress display shows it.
        run: the recompression's label; empty if the work is not a part of one, and then nothing is kept.
    """
    events = StageEvents(label)
    events.emit("opened")
    leave_stage(run, label)
    try:
        yield events
    except Refusal as error:
        events.emit("refused", message=str(error))
        leave_failure(run, label, error)
        raise
    except BaseException as error:
        mendable = of_machine(error)
        events.emit("refused" if mendable else "failed", message=str(mendable or f"{type(error).__name__}: {error}"))
        leave_failure(run, label, mendable or error)
        raise
    events.finish()
