"""A stage's metrics and progress: to its MLflow run, to `metrics.jsonl` and to the progress display."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric

from components.lib.stage.events import EventSink
from components.lib.tracking.client import client

log = logging.getLogger(__name__)

SHOWN = {".json", ".jsonl", ".svg", ".html", ".md"}
"""Files of a stage's output that are also kept as artifacts of its MLflow run; checkpoints stay in the store alone."""

FLUSH_SECONDS = 5.0
LONGEST_PAUSE = 300.0
"""Seconds between two attempts to send metrics to a server that is away: each attempt delays the training."""
PROGRESS_SECONDS = 0.3


class StageJournal:
    """Log metrics to MLflow, to `metrics.jsonl` and to the progress display.

    Metrics that MLflow did not accept are kept and sent again later: an outage of the server does not stop the training,
    and `metrics.jsonl`, from which the report is drawn, is always complete.

    Args:
        run_id: the stage's MLflow run.
        out: the stage's output folder.
        sink: receives the progress events.
    """

    def __init__(self, run_id: str, out: Path, sink: EventSink) -> None:
        self.run_id = run_id
        self._sink = sink
        self._file = out / "metrics.jsonl"
        self._waiting: list[Metric] = []
        self._pause = FLUSH_SECONDS
        self._flushed = self._emitted = time.monotonic()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics at a step, such as `loss` at an optimizer step."""
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self._flushed > self._pause:
            self.flush()

    def flush(self) -> None:
        """Send the waiting metrics to MLflow; keep those that it does not accept."""
        try:
            while self._waiting:
                client().log_batch(self.run_id, metrics=self._waiting[:1000])
                del self._waiting[:1000]
            self._pause = FLUSH_SECONDS
        except Exception as error:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            log.warning("MLflow accepted no metrics (%s); %d wait", error, len(self._waiting))
        self._flushed = time.monotonic()

    def progress(self, done: int, total: int, **shown: float) -> None:
        """Emit a progress event, a few times a second at most; the last one is always emitted."""
        if done < total and time.monotonic() - self._emitted < PROGRESS_SECONDS:
            return
        self._emitted = time.monotonic()
        self._sink("progress", done=done, total=total, shown=shown)

    def leave(self, out: Path, reference: str, seconds: float) -> None:
        """Keep the small files of the output as artifacts of the run, and its reference as a tag.

        Best effort: the output is already complete in the store, so an MLflow outage must not fail the stage.
        """
        try:
            client().set_tag(self.run_id, "espalier.output", reference)
            client().log_metric(self.run_id, "seconds", seconds)
            for path in sorted(out.iterdir()):
                if path.suffix in SHOWN:
                    client().log_artifact(self.run_id, str(path))
        except Exception as error:
            log.warning("MLflow accepted no copy of the stage's files (%s); they are at %s", error, reference)
