"""The watcher on this machine: look at the sources, and recompress the new releases, at most N at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

from rich.console import Console

from components.lib.errors import Refusal, StageFailed, Unavailable
from components.lib.recipe.loading import parse_recipe
from components.lib.store.claims import Claims
from components.lib.store.runs import Ending, failure
from components.lib.store.store import Store
from components.lib.tracking import client, registry
from components.register.searched import target_sentence
from components.watch.find import Finding, Item, Watched, look, take
from pipeline.runners.run import in_environment, run
from pipeline.services.embedded import services

LEASE = timedelta(minutes=10)
"""Renewed during the work, so that the items of a killed watcher are soon free again."""


@dataclass(frozen=True)
class Outcome:
    """The result for one source."""

    release: str
    name: str
    state: Literal["pass", "fail", "new", "registered", "claimed", "failed", "refused"]
    detail: str = ""
    tried: bool = False
    """Whether this watch worked on it; False for a failure recorded by an earlier watch."""


def watch_once(
    sources: Sequence[Watched], at_most: int, home: Path, console: Console, retry: bool = False
) -> list[Outcome]:
    """Look once at every source, and recompress the new releases.

    Args:
        sources: the watched sources.
        at_most: how many are recompressed at the same time; more than one run in processes of their own.
        home: the folder of all state.
        console: shows the progress.
        retry: first delete the records of earlier failures and claims.

    Raises:
        Refusal: the store or MLflow does not answer.
    """
    with services(home) as environment, in_environment(environment):
        store = Store.from_environment()
        store.check()
        client.check()
        claims = Claims(store, LEASE)
        findings = [_look(watched, store, claims, retry) for watched in sources]
        # An item that is listed twice is made once.
        new = list(dict.fromkeys(finding.item for finding in findings if finding.state == "new" and finding.item))
        made = dict(zip(new, _work(new, at_most, home, console), strict=True))
        return [(finding.item and made.get(finding.item)) or _outcome(finding) for finding in findings]


def look_once(sources: Sequence[Watched], home: Path) -> list[Outcome]:
    """Look once at every source, and return which would be recompressed and why; nothing is claimed or started.

    Raises:
        Refusal: the store or MLflow does not answer.
    """
    with services(home) as environment, in_environment(environment):
        store = Store.from_environment()
        store.check()
        client.check()
        claims = Claims(store, LEASE)
        found = [look(watched, store, claims) for watched in sources]
        return [Outcome(one.watched.release, one.watched.name, one.state, one.detail) for one in found]


def recompress(item: Item, home: Path, console: Console) -> Outcome:
    """Claim one item, recompress it, and record the result in its claim."""
    store = Store.from_environment()
    claims = Claims(store, LEASE)
    label = take(item, claims)
    if label is None:
        return Outcome(item.release, item.name, "claimed", "by another watcher, which was first")
    with _dropped(claims, item, label):
        try:
            with claims.held(item.name, item.claim, label):
                result = run(parse_recipe(item.recipe), item.release, item.name, home, console, label)
        except Exception as error:
            version = _registered(item)
            if version:
                claims.clear(item.name, item.claim)
                return Outcome(item.release, item.name, "registered", f"as version {version}, by another watcher")
            end = failure(label, store) or _ending(error)
            claim = claims.fail(item.name, item.claim, label, end)
            return Outcome(item.release, item.name, "failed", claim.reason, tried=True)
        registered = result.report.registered
        if registered is None:
            end = Ending(succeeded=False, stage="register", reason=target_sentence(result.report), lasting=True)
            return Outcome(
                item.release, item.name, "fail", claims.fail(item.name, item.claim, label, end).reason, tried=True
            )
        claims.clear(item.name, item.claim)
    state: Literal["pass", "fail"] = "pass" if result.report.verdict.passed else "fail"
    return Outcome(
        item.release, item.name, state, f"version {registered.version}, {result.folder / 'report.html'}", tried=True
    )


def _registered(item: Item) -> str | None:
    """Return the version that another watcher made for the item; None if there is none, or MLflow does not answer."""
    with suppress(Exception):
        version = registry.made_for(item.name, item.key)
        return version.version if version else None
    return None


@contextmanager
def _dropped(claims: Claims, item: Item, label: str) -> Iterator[None]:
    """Drop the claim if the work is interrupted rather than failed, as by Ctrl-C."""
    try:
        yield
    except BaseException:
        claims.drop(item.name, item.claim, label)
        raise


def _ending(error: Exception) -> Ending:
    """Return the ending of a run that recorded none: it was refused before its first stage, or a stage was killed."""
    if isinstance(error, Refusal):
        return Ending(succeeded=False, reason=str(error), lasting=not isinstance(error, Unavailable))
    reason = str(error) if isinstance(error, StageFailed) else f"{type(error).__name__}: {error}"
    return Ending(succeeded=False, reason=reason)


def _look(watched: Watched, store: Store, claims: Claims, retry: bool) -> Finding:
    finding = look(watched, store, claims)
    if retry and finding.item and finding.state in {"failed", "claimed"}:
        claims.clear(finding.item.name, finding.item.claim)
        return replace(finding, state="new")
    return finding


def _outcome(finding: Finding) -> Outcome:
    assert finding.state != "new", "a new item was worked on"
    return Outcome(finding.watched.release, finding.watched.name, finding.state, finding.detail)


def _work(items: Sequence[Item], at_most: int, home: Path, console: Console) -> list[Outcome]:
    if min(at_most, len(items)) <= 1:
        return [recompress(item, home, console) for item in items]
    # A run replaces the standard output of its process, so two runs at a time need two processes.
    with ProcessPoolExecutor(at_most, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_recompress_quietly, items, [home] * len(items)))


def _recompress_quietly(item: Item, home: Path) -> Outcome:
    return recompress(item, home, Console(quiet=True))
