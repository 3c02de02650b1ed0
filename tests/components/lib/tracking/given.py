"""What the tests of this folder start from."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from components.lib.store.store import Reference
from components.lib.tracking.journal import StageJournal
from components.lib.tracking.runs import stage_run

NOWHERE = "http://127.0.0.1:9"
"""An address at which nothing answers."""

AWAY = ("MLFLOW_TRACKING_URI", NOWHERE)


def a_run(
    label: str,
    out: Path,
    key: str = "a" * 64,
    variant: str = "",
    emitted: list[Any] | None = None,
    **settings: Any,
) -> AbstractContextManager[StageJournal]:
    """The run of a stage called prune; its events are appended to `emitted`."""

    def sink(event: str, **details: Any) -> None:
        if emitted is not None:
            emitted.append((event, details))

    tags = {"sha256.key": key, "sha256.code": "c" * 64, "espalier.input.model": str(reference("b"))}
    return stage_run(label, "prune", variant, tags, settings, out, sink)


def reference(letter: str, bucket: str = "bucket") -> Reference:
    return Reference(f"s3://{bucket}/stages/prune/{letter}", letter * 64)
