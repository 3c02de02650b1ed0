"""What a run leaves in the store beside its report, at `runs/<run>/`, for whoever asks later what became of it.

A watcher does not wait for the runs that it starts on a cluster, and may be another process than the one that started them:
it reads here which item a run was for, whether it ended, and why.
"""

from __future__ import annotations

import contextlib
import json

from pydantic import BaseModel, ConfigDict

from components.lib.errors import Refusal, Unavailable
from components.lib.store.store import Store


class Ending(BaseModel):
    """How a run ended."""

    model_config = ConfigDict(frozen=True)

    succeeded: bool
    stage: str = ""
    """The stage it ended in, where it did not succeed and the stage could say so."""
    reason: str = ""
    lasting: bool = False
    """Whether the same release, recipe and code would end so again."""


def leave_item(run: str, key: str, store: Store) -> None:
    """Note which item, by its key, the run is made for."""
    store.write_text(f"runs/{run}/item", key)


def item_of(run: str, store: Store) -> str | None:
    """The key of the item that the run is made for; None where no watcher started it."""
    return store.read_text(f"runs/{run}/item")


def leave_failure(run: str, stage: str, error: BaseException) -> None:
    """Keep why the stage failed, as well as can be: what is told of an error must not hide the error."""
    if not run:
        return
    refused = isinstance(error, Refusal)
    reason = str(error) if refused else f"{type(error).__name__}: {error}"
    lasting = refused and not isinstance(error, Unavailable)
    failure = Ending(succeeded=False, stage=stage, reason=reason, lasting=lasting)
    with contextlib.suppress(Exception):
        Store.from_environment().write_text(f"runs/{run}/failure.json", failure.model_dump_json())


def leave_end(run: str, succeeded: bool) -> None:
    """Note that the run is over. A failure that was left before counts only from now: a stage that fails may be tried again."""
    Store.from_environment().write_text(f"runs/{run}/ended.json", json.dumps({"succeeded": succeeded}))


def ending(run: str, store: Store) -> Ending | None:
    """How the run ended, or None where it is not known to be over."""
    ended = store.read_text(f"runs/{run}/ended.json")
    if ended is None:
        return None
    if json.loads(ended)["succeeded"]:
        return Ending(succeeded=True)
    return failure(run, store) or Ending(succeeded=False, reason="the run failed and left no reason: see its logs")


def failure(run: str, store: Store) -> Ending | None:
    """The last failure that a stage of the run left, whether or not the run is over."""
    left = store.read_text(f"runs/{run}/failure.json")
    return Ending.model_validate_json(left) if left else None
