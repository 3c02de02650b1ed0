"""Pin task files: store each with the data that it names, so that a run has them on any machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

from components.lib.recipe.schema import Evaluate
from components.lib.sources.tasks import collected, task_digest
from components.lib.store.store import Reference, Store
from components.lib.tasks.files import collect
from components.lib.tasks.load import load_tasks


def pin_task(task: str, remote_code: bool, store: Store) -> Reference:
    """Put a task file, or a folder of them, into the store with the files that they name. A reference is returned as it is.

    Raises:
        Refusal: it cannot be found, or names a file that is not there, or code that may not run.
    """
    if "@sha256:" in task:
        return Reference.parse(task)
    with collected(task, remote_code, store) as folder:
        return store.put_content(folder, "tasks", {"source": task})


def find_task(task: str, remote_code: bool, store: Store) -> Reference | None:
    """Return the reference that pinning the task would give, if it is in the store; nothing is stored."""
    if "@sha256:" in task:
        return Reference.parse(task)
    return store.find(f"tasks/{task_digest(task, remote_code, store)}")


def check_task(task: str, remote_code: bool) -> None:
    """Raise Refusal if a task of this machine, or a file that it names, is missing, or needs code that may not run."""
    with tempfile.TemporaryDirectory(prefix="espalier-tasks-") as scratch:
        collect(Path(task), Path(scratch), remote_code)


def check_loadable(evaluate: Evaluate, store: Store) -> None:
    """Load every task of a pinned recipe with its data, and drop it.

    Raises:
        Refusal: lm-eval is not installed or does not know a task, or a task cannot be loaded.
    """
    if not evaluate.tasks and not evaluate.continuations:
        return
    with tempfile.TemporaryDirectory(prefix="espalier-tasks-") as scratch:
        folders = [
            store.get(Reference.parse(task), Path(scratch) / str(place))
            for place, task in enumerate(evaluate.task_files)
        ]
        load_tasks(evaluate.named_tasks, folders, remote_code=evaluate.remote_code)
