"""The state of a run in the store, at `runs/<run>/`: its watched item, its newest stage, the artifacts it found, its last failure and
its end.

A watcher does not wait for the runs that it starts on a cluster, so a later process reads here for which item a run was made,
whether it ended, and why. A comparison on a cluster reads here how far each of its cells is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from components.lib.errors import Refusal, Unavailable
from components.lib.store.store import Reference, Store


class Ending(BaseModel):
    """How a run ended."""

    model_config = ConfigDict(frozen=True)

    succeeded: bool
    stage: str = ""
    """The stage that failed, if it is known."""
    reason: str = ""
    lasting: bool = False
    """Whether the same release, recipe and code would fail again."""


def leave_item(run: str, key: str, store: Store) -> None:
    """Record the key of the item for which the run is made."""
    store.write_text(f"runs/{run}/item", key)


def item_of(run: str, store: Store) -> str | None:
    """Return the key of the item for which the run is made; None if no watcher started the run."""
    return store.read_text(f"runs/{run}/item")


def leave_uses(run: str, stage: str, references: Iterable[Reference | str], store: Store) -> None:
    """Record older artifacts that a stage of the run found and later stages read, so that garbage collection keeps them."""
    store.write_text(f"runs/{run}/uses/{stage}", "\n".join(map(str, references)))


def leave_stage(run: str, stage: str) -> None:
    """Record that the stage began. Best effort: it never raises, because only a progress display reads it."""
    if run:
        with contextlib.suppress(Exception):
            Store.from_environment().write_text(f"runs/{run}/stage", stage)


def newest_stage(run: str, store: Store) -> str:
    """Return the stage of the run that began last; empty if none began."""
    return store.read_text(f"runs/{run}/stage") or ""


def forget(run: str, store: Store) -> None:
    """Delete the record of an earlier attempt, so that its failure and its end do not count for the next one."""
    for name in ("stage", "failure.json", "ended.json"):
        store.delete_text(f"runs/{run}/{name}")


def leave_failure(run: str, stage: str, error: BaseException) -> None:
    """Record why the stage failed. Best effort: it never raises, so that it cannot hide the error."""
    if not run:
        return
    refused = isinstance(error, Refusal)
    reason = str(error) if refused else f"{type(error).__name__}: {error}"
    lasting = refused and not isinstance(error, Unavailable)
    failure = Ending(succeeded=False, stage=stage, reason=reason, lasting=lasting)
    with contextlib.suppress(Exception):
        Store.from_environment().write_text(f"runs/{run}/failure.json", failure.model_dump_json())


def leave_end(run: str, succeeded: bool) -> None:
    """Record that the run is over. Only now does a recorded failure count, because Kubeflow may retry a stage that failed."""
    Store.from_environment().write_text(f"runs/{run}/ended.json", json.dumps({"succeeded": succeeded}))


def leave_unregistered(run: str, reason: str, store: Store) -> None:
    """Record why a run that worked registered nothing: the same release, recipe and code would not register either."""
    store.write_text(f"runs/{run}/unregistered", reason)


def ending(run: str, store: Store) -> Ending | None:
    """Return how the run ended, or None if no end is recorded."""
    ended = store.read_text(f"runs/{run}/ended.json")
    if ended is None:
        return None
    if json.loads(ended)["succeeded"]:
        reason = store.read_text(f"runs/{run}/unregistered")
        return (
            Ending(succeeded=False, stage="register", reason=reason, lasting=True) if reason else Ending(succeeded=True)
        )
    return failure(run, store) or Ending(succeeded=False, reason="the run failed and left no reason: see its logs")


def failure(run: str, store: Store) -> Ending | None:
    """Return the last failure that a stage of the run recorded, whether or not the run has ended."""
    left = store.read_text(f"runs/{run}/failure.json")
    return Ending.model_validate_json(left) if left else None
