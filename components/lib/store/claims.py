"""Claims of watchers on items, and of promotions on models: one at a time, for a limited time, on an S3 with consistent listings
and nothing more.

Not every S3 refuses a second writer, so a claim is not one object that the first writer owns. Each watcher writes an object of
its own, below `claims/<name>/<key>/`, and all of them reach the same decision by reading:

1. *ask*: write a claim in the state `asking`;
2. wait longer than a write takes, and longer than the full second to which S3 may round its times;
3. list: if no claim is `working`, the earliest asker by S3's own clock (for equal times, the first by name) writes `working`,
   and the others delete their claims.

All times are S3's, because the clocks of the watchers may differ. A later asker sees the claims of all earlier ones. A claim expires by itself: that of a dead asker after a minute, that of a
worker after its lease, which the worker may renew. A worker whose lease expired, as on a machine that slept, gives way to
another that took the item over meanwhile. It still works until it next looks, so a claim merely saves work. The registry
prevents duplicate versions: an item has one version there, and so have equal checkpoints (`registry.register_version`).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict

from components.lib.store.runs import Ending, ending, failure, leave_item
from components.lib.store.store import Store

SETTLE = 3.0
"""Seconds between asking and deciding."""
ASKING = timedelta(minutes=1)
"""An asker that has not decided after this time counts as dead."""
ATTEMPTS = 3
"""After so many failures that might have been temporary, an item is given up until its key changes."""


class Claim(BaseModel):
    """The claim of one run on one item; its object is named after the run."""

    model_config = ConfigDict(frozen=True)

    state: Literal["asking", "working", "failed"]
    until: datetime
    """Expires at this time of S3's clock, unless it records a failure."""
    reason: str = ""
    lasting: bool = False

    def live(self, now: datetime) -> bool:
        """Return True if the claim is neither a failure nor expired at this time of S3's clock."""
        return self.state != "failed" and self.until > now


@dataclass(frozen=True)
class Standing:
    """The state of an item, from all claims on it."""

    state: Literal["free", "claimed", "failed"]
    detail: str = ""


class Claims:
    """The claims of all watchers, in the store."""

    def __init__(self, store: Store, lease: timedelta, settle: float = SETTLE) -> None:
        self.lease = lease
        self._store = store
        self._settle = settle

    def standing(self, name: str, key: str) -> Standing:
        """Return the state of an item, after updating the claims of runs that ended or whose leases expired."""
        now = self._store.clock()
        found = {run: self._updated(name, key, run, claim, now) for run, claim in self._read(name, key).items()}
        claims = {run: claim for run, claim in found.items() if claim}
        failed = [claim for claim in claims.values() if claim.state == "failed"]
        lasting = [claim for claim in failed if claim.lasting]
        if lasting:
            return Standing("failed", lasting[0].reason)
        if len(failed) >= ATTEMPTS:
            return Standing("failed", f"given up after {len(failed)} attempts, the last of which: {failed[-1].reason}")
        for run, claim in claims.items():
            if claim.live(now):
                return Standing("claimed", f"by the run {run}, until {claim.until:%Y-%m-%d %H:%M} UTC at most")
        return Standing("free")

    def take(self, name: str, key: str, item: str = "") -> str | None:
        """Claim a free item. Return the label of the run to make for it, or None if another watcher was first."""
        run = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        asked = time.monotonic()
        self._write(name, key, run, Claim(state="asking", until=self._store.clock() + ASKING))
        time.sleep(self._settle)
        # Other watchers may count an asker that was delayed for so long as dead.
        late = time.monotonic() - asked > ASKING.total_seconds() / 2
        if late or not self._is_first(name, key, run):
            self.drop(name, key, run)
            return None
        self._write(name, key, run, Claim(state="working", until=self._store.clock() + self.lease))
        leave_item(run, item or key, self._store)
        return run

    def keep(self, name: str, key: str, run: str) -> bool:
        """Renew the claim of a run that works. Return False if it is no longer this run's.

        That is so if it was deleted, or if it expired and another watcher has the item.
        """
        now = self._store.clock()
        claims = self._read(name, key)
        own = claims.pop(run, None)
        if own is None or (not own.live(now) and any(other.live(now) for other in claims.values())):
            return False
        # From the time before the look: if this process stops here, it writes a claim that has expired.
        self._write(name, key, run, Claim(state="working", until=now + self.lease))
        return True

    @contextlib.contextmanager
    def held(self, name: str, key: str, run: str) -> Iterator[None]:
        """Renew the claim three times a lease while the block runs, until another watcher has it."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(self.lease.total_seconds() / 3):
                # If S3 does not answer, the lease may expire; the work continues.
                with contextlib.suppress(Exception):
                    if not self.keep(name, key, run):
                        return

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def fail(self, name: str, key: str, run: str, end: Ending) -> Claim:
        """Record that the run failed, and whether it would fail again."""
        reason = f"{end.stage}: {end.reason}" if end.stage else end.reason
        claim = Claim(state="failed", until=self._store.clock(), reason=reason, lasting=end.lasting)
        self._write(name, key, run, claim)
        return claim

    def drop(self, name: str, key: str, run: str) -> None:
        """Delete one claim."""
        self._store.delete_text(f"{_prefix(name, key)}/{run}.json")

    def clear(self, name: str, key: str) -> None:
        """Delete every claim on an item, because it is registered or a user wants to retry it."""
        for run in self._read(name, key):
            self.drop(name, key, run)

    def _updated(self, name: str, key: str, run: str, claim: Claim, now: datetime) -> Claim | None:
        """Return the claim after recording the end of its run, or None if the claim is over and was deleted."""
        if claim.state == "failed":
            return claim
        end = ending(run, self._store) if claim.state == "working" else None
        if end is None and claim.live(now):
            return claim
        if claim.state == "asking" or (end and end.succeeded):
            # After a success the registry decides, because a user may have deleted the version since.
            self.drop(name, key, run)
            return None
        unheard = Ending(succeeded=False, reason=f"the run {run} reported no end, and its lease has expired")
        return self.fail(name, key, run, end or failure(run, self._store) or unheard)

    def _is_first(self, name: str, key: str, run: str) -> bool:
        # Read the times first: a claim that changes from asking to working in between is then read as working.
        taken = {file.removesuffix(".json"): at for file, at in self._store.texts(_prefix(name, key)).items()}
        if run not in taken:
            return False
        claims, now = self._read(name, key), self._store.clock()
        if any(claim.state == "working" and claim.live(now) for claim in claims.values()):
            return False
        # Compare by S3's clock only, because the watchers' clocks may differ.
        askers = [
            (taken[other], other)
            for other, claim in claims.items()
            if claim.state == "asking" and other in taken and taken[other] > taken[run] - ASKING
        ]
        return min(askers, default=None) == (taken[run], run)

    def _read(self, name: str, key: str) -> dict[str, Claim]:
        """Return every claim on the item by its run, oldest run first."""
        prefix = _prefix(name, key)
        texts = {file: self._store.read_text(f"{prefix}/{file}") for file in sorted(self._store.texts(prefix))}
        return {
            file.removesuffix(".json"): Claim.model_validate_json(text)
            for file, text in texts.items()
            if text is not None
        }

    def _write(self, name: str, key: str, run: str, claim: Claim) -> None:
        self._store.write_text(f"{_prefix(name, key)}/{run}.json", claim.model_dump_json())


def _prefix(name: str, key: str) -> str:
    return f"claims/{name}/{key}"
