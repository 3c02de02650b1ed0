"""Protocols for the metrics and progress of long work and for its checkpoints, with implementations that do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Journal(Protocol):
    """Takes metrics and progress. A stage's runner sends them to MLflow and to the user's terminal."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step of the work (a curve), such as `loss` at an optimizer step."""

    def progress(self, done: int, total: int, **shown: float) -> None:
        """Report that `done` of `total` equal parts are done, with a few numbers to show beside the bar."""


class Checkpoints(Protocol):
    """Keeps folders, so that interrupted work resumes from the last one."""

    def save(self, folder: Path, step: int) -> None:
        """Keep the folder's files as the checkpoint of `step`; older ones may be dropped once it is complete."""

    def latest(self, folder: Path) -> int | None:
        """Put the newest complete checkpoint's files into `folder` and return its step, or None if there is none."""


class SeveralCheckpoints(Checkpoints, Protocol):
    """Checkpoints of several trainings in one piece of work."""

    def scoped(self, name: str) -> Checkpoints:
        """Return the checkpoints of the training called `name`; they are kept apart."""


class Silent:
    """A journal that ignores everything, for a researcher's own loop and for tests."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Drop the numbers."""

    def progress(self, done: int, total: int, **shown: float) -> None:
        """Drop the progress."""


class NoCheckpoints:
    """Keeps nothing."""

    def save(self, folder: Path, step: int) -> None:
        """Drop the folder."""

    def latest(self, folder: Path) -> int | None:
        """Return None: there is never one."""
        return None

    def scoped(self, name: str) -> NoCheckpoints:
        """Return itself."""
        return self
