"""Task files at their sources: collected with the data that they name, and identified by their content."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.lib.store.artifacts import Manifest
from components.lib.store.store import Reference, Store
from components.lib.tasks.files import collect


@contextmanager
def collected(task: str, remote_code: bool, store: Store) -> Iterator[Path]:
    """Yield a folder with a task's files.

    Args:
        task: a path or an `s3://` prefix of a task file, or of a folder of them.
        remote_code: whether the tasks may run Python code that comes with them.
        store: fetches from S3.

    Raises:
        Refusal: it cannot be found, or names a file that is not there, or code that may not run.
    """
    with tempfile.TemporaryDirectory(prefix="espalier-tasks-") as scratch:
        source, out = Path(task), Path(scratch) / "collected"
        if task.startswith("s3://"):
            source = store.fetch(task, Path(scratch) / "fetched")
        out.mkdir()
        yield collect(source, out, remote_code)


def task_digest(task: str, remote_code: bool, store: Store) -> str:
    """Return the digest of a task's files (hex), which is that of its reference in the store."""
    if "@sha256:" in task:
        return Reference.parse(task).digest
    with collected(task, remote_code, store) as folder:
        return Manifest.of(folder).digest
