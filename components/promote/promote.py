"""Move the alias `champion`: to a challenger that passed, or back to the champion before it.

A promotion runs alone (a claim in the store), checks the version's files (`checks.py`), and then moves the aliases in an order in
which no moment is without a champion: `previous` first, then `champion`. The trail has an entry before the first alias moves, so
that a promotion that was interrupted is completed, or its traces are removed, by the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from components.lib.errors import Refusal, Unavailable
from components.lib.store.claims import SETTLE, Claims
from components.lib.store.store import Store
from components.lib.tracking import registry, trail
from components.lib.tracking.registry import Version
from components.lib.tracking.trail import Promotion
from components.promote.checks import Checked, check_version

LEASE = timedelta(minutes=1)
"""A promotion that was killed blocks the next one for this time; a living one renews its claim."""


@dataclass(frozen=True)
class Choice:
    """The version that would become champion, and the present champion."""

    candidate: Version
    champion: Version | None


@dataclass(frozen=True)
class Promoted:
    """The champion after a promotion or a rollback."""

    champion: Version
    was: str
    """The version that was champion before; empty if there was none."""
    checked: Checked | None
    """What the checks found; None if the version was champion already."""


def choose(name: str, version: str = "", force: bool = False) -> Choice:
    """Return the version to promote, the challenger if `version` is empty, beside the champion. Nothing is changed.

    Args:
        name: the registered model.
        version: its version.
        force: allow a version whose verdict is not pass, or that was compared with another champion.

    Raises:
        Refusal: there is no such version, its verdict is not pass, or the champion is not the one it was compared with.
    """
    champion = registry.aliased(name, "champion")
    candidate = registry.version_of(name, version) if version else _challenger(name, champion)
    if force or (champion and champion.version == candidate.version):
        return Choice(candidate, champion)
    verdict = _verdict(candidate)
    if verdict != "pass":
        raise Refusal(
            f"version {candidate.version} of {name} has the verdict {verdict}: pass --force to promote it anyway"
        )
    compared = candidate.tags.get(registry.COMPARED, registry.ANY)
    if champion and compared not in (registry.ANY, champion.tags.get(registry.DIGEST)):
        against = "no champion" if compared == registry.NONE else "another champion"
        raise Refusal(
            f"version {candidate.version} of {name} was compared with {against}, and now version {champion.version} is "
            "champion: run the recompression again, which measures both, or pass --force"
        )
    return Choice(candidate, champion)


def promote(
    name: str, version: str = "", *, force: bool = False, by: str = "", why: str = "", over: str | None = None
) -> Promoted:
    """Make a registered version champion after checking its files.

    Args:
        name: the registered model.
        version: its version; the challenger when empty.
        force: promote a version whose verdict is not pass, or that was compared with another champion.
        by: who promotes; the user of this process when empty.
        why: the reason, for the trail.
        over: the champion's version that the caller saw, empty for none; not compared if None.

    Raises:
        Refusal: as `choose` and `check_version`; or the champion is another one than the caller saw.
        Unavailable: another promotion of this model is under way.
    """
    store = Store.from_environment()
    with _alone(name, store):
        completed = _settle(name)
        if not version and registry.aliased(name, "challenger") is None:
            version = completed
        choice = choose(name, version, force)
        candidate = choice.candidate
        was = choice.champion.version if choice.champion else ""
        if over is not None and over != was and candidate.version != was:
            raise Unavailable(
                f"version {was or 'none'} of {name} became champion in the meantime: look at espalier models {name}, and promote again"
            )
        if candidate.version == was:
            registry.drop_alias(name, "challenger", was)
            return Promoted(registry.version_of(name, was), was, None)
        checked = check_version(candidate, store)
        entry = _entry(name, "promote", candidate, was, by, why, checked.signature)
        trail.record(name, entry)
        if was:
            registry.set_alias(name, "previous", was)
        registry.set_alias(name, "champion", candidate.version)
        registry.drop_alias(name, "challenger", candidate.version)
        _done(name, entry)
        return Promoted(registry.version_of(name, candidate.version), was, checked)


def rollback(name: str, *, by: str = "", why: str = "") -> Promoted:
    """Make `previous` champion again after checking its files; `previous` becomes the champion before that one.

    A second rollback goes one champion further back, never forward: two people who roll back at the same time do not undo each other.

    Raises:
        Refusal: there is no previous champion, or its files are not what they were.
        Unavailable: another promotion of this model is under way.
    """
    store = Store.from_environment()
    with _alone(name, store):
        _settle(name)
        previous = registry.aliased(name, "previous")
        champion = registry.aliased(name, "champion")
        if previous is None or (champion and previous.version == champion.version):
            raise Refusal(f"{name} has no previous champion to go back to: espalier models {name} lists the versions")
        checked = check_version(previous, store)
        was = champion.version if champion else ""
        entry = _entry(name, "rollback", previous, was, by, why, checked.signature)
        trail.record(name, entry)
        registry.set_alias(name, "champion", previous.version)
        _point_previous(name, _earlier(name, previous.version))
        _done(name, entry)
        return Promoted(registry.version_of(name, previous.version), was, checked)


@contextmanager
def _alone(name: str, store: Store) -> Iterator[None]:
    """Hold the claim on the model's promotion. Raises Unavailable if another process holds it."""
    claims = Claims(store, LEASE, SETTLE)
    run = claims.take(name, "promotion")
    if run is None:
        raise Unavailable(
            f"another promotion of {name} is under way: wait a minute, look at espalier models {name}, and try again"
        )
    try:
        with claims.held(name, "promotion", run):
            yield
    finally:
        # If S3 does not answer, the claim expires by itself; the error of the promotion must not be hidden.
        with suppress(Exception):
            claims.drop(name, "promotion", run)


def _settle(name: str) -> str:
    """End the promotions in the trail that were interrupted: complete one whose champion moved, undo the others.

    Returns:
        The version whose promotion was completed; empty if there was none.
    """
    completed = ""
    champion = registry.aliased(name, "champion")
    for entry in trail.trail(name):
        if entry.state != "begun":
            continue
        if champion is None or champion.version != entry.target:
            if entry.action == "promote" and champion and champion.version == entry.source:
                _point_previous(name, entry.previous)
            trail.record(name, entry.model_copy(update={"state": "given up"}))
            continue
        if entry.action == "rollback":
            _point_previous(name, _earlier(name, entry.target))
        else:
            registry.drop_alias(name, "challenger", entry.target)
        _done(name, entry)
        completed = entry.target
    return completed


def _earlier(name: str, version: str) -> str:
    """Return the version that was champion before this one, or empty if there was none or it is deleted."""
    found = trail.before(name, version)
    return found if found in {one.version for one in registry.versions(name)} else ""


def _point_previous(name: str, version: str) -> None:
    """Point `previous` at the version; drop the alias if there is none."""
    if version:
        registry.set_alias(name, "previous", version)
        return
    present = registry.aliased(name, "previous")
    if present:
        registry.drop_alias(name, "previous", present.version)


def _entry(
    name: str, action: Literal["promote", "rollback"], target: Version, was: str, by: str, why: str, signature: str
) -> Promotion:
    previous = registry.aliased(name, "previous")
    return Promotion(
        action=action,
        by=by or trail.user(),
        at=trail.now(),
        source=was,
        target=target.version,
        previous=previous.version if previous else "",
        why=why,
        verdict=_verdict(target),
        signature=signature,
    )


def _done(name: str, entry: Promotion) -> None:
    """Record that the aliases have moved, in the trail and on the version."""
    target = registry.version_of(name, entry.target)
    registry.tag_version(
        target,
        {
            "espalier.promoted_by": entry.by,
            "espalier.promoted_at": f"{entry.at:%Y-%m-%d %H:%M:%S} UTC",
            "espalier.signature": entry.signature,
        },
    )
    trail.record(name, entry.model_copy(update={"state": "done"}))


def _verdict(version: Version) -> str:
    return version.tags.get("espalier.verdict", "missing")


def _challenger(name: str, champion: Version | None) -> Version:
    challenger = registry.aliased(name, "challenger")
    if challenger is None:
        present = f" (champion is version {champion.version})" if champion else ""
        raise Refusal(
            f"the registered model {name!r} has no challenger{present}: name a version (--version), or run a recompression whose rules hold"
        )
    return challenger
