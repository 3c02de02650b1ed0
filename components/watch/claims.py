"""Who works on which item: one watcher at a time, for a limited time, on an S3 that promises no more than to list what it took.

Not every S3 refuses a second writer, so a claim is not one object that the first writer owns. Each watcher writes an object of
its own, below `claims/<name>/<key>/`, and all of them come to the same answer by reading:

1. *ask*: write a claim in the state `asking`;
2. wait, longer than a write takes and longer than the whole second that S3 may round its times to;
3. list: where nobody is `working`, the earliest asker by S3's own clock has it (by name, where two are level), says `working`,
   and the others take their claims back.

Whoever asks later sees the others' claims, and whoever asked earlier is seen. A claim ends by itself: an asker that died is
forgotten after a minute, a worker after its lease, which it may renew. A lease cannot stop a worker that only seemed dead, so
the claim spares work and is not what keeps versions apart: that is the registry, where the same checkpoint is one version.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict

from components.lib.store.runs import Ending, ending, failure, leave_item
from components.lib.store.store import Store

SETTLE = 3.0
"""Seconds between asking and deciding."""
ASKING = timedelta(minutes=1)
"""An asker that has not decided by then is dead."""
ATTEMPTS = 3
"""An item whose runs fail so often for reasons that might have passed is given up until its key changes."""


class Claim(BaseModel):
    """What one run says of one item; the run that is claimed for is its name."""

    model_config = ConfigDict(frozen=True)

    state: Literal["asking", "working", "failed"]
    until: datetime
    """Not believed after that time, where it is no failure."""
    reason: str = ""
    lasting: bool = False

    @property
    def live(self) -> bool:
        """Whether somebody stands behind it."""
        return self.state != "failed" and self.until > _now()


@dataclass(frozen=True)
class Standing:
    """What the claims on an item come to."""

    state: Literal["free", "claimed", "failed"]
    detail: str = ""


class Claims:
    """The claims of all watchers, in the store."""

    def __init__(self, store: Store, lease: timedelta, settle: float = SETTLE) -> None:
        self.lease = lease
        self._store = store
        self._settle = settle

    def standing(self, name: str, key: str) -> Standing:
        """Look at an item, after every run that ended, or whose lease did, has been put down as what became of it."""
        found = {run: self._brought_up(name, key, run, claim) for run, claim in self._read(name, key).items()}
        claims = {run: claim for run, claim in found.items() if claim}
        failed = [claim for claim in claims.values() if claim.state == "failed"]
        lasting = [claim for claim in failed if claim.lasting]
        if lasting:
            return Standing("failed", lasting[0].reason)
        if len(failed) >= ATTEMPTS:
            return Standing("failed", f"given up after {len(failed)} attempts, the last of which: {failed[-1].reason}")
        for run, claim in claims.items():
            if claim.live:
                return Standing("claimed", f"by the run {run}, until {claim.until:%Y-%m-%d %H:%M} UTC at most")
        return Standing("free")

    def take(self, name: str, key: str, item: str = "") -> str | None:
        """Claim an item that is free. Returns the label of the run to make for it; None where another watcher was first."""
        run = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        asked = time.monotonic()
        self._write(name, key, run, Claim(state="asking", until=_now() + ASKING))
        time.sleep(self._settle)
        # An asker that was held up for so long is taken for dead by the others.
        late = time.monotonic() - asked > ASKING.total_seconds() / 2
        if late or not self._is_first(name, key, run):
            self.drop(name, key, run)
            return None
        self.renew(name, key, run)
        leave_item(run, item or key, self._store)
        return run

    def renew(self, name: str, key: str, run: str) -> None:
        """Say that the run is at work, for one more lease."""
        self._write(name, key, run, Claim(state="working", until=_now() + self.lease))

    @contextlib.contextmanager
    def held(self, name: str, key: str, run: str) -> Iterator[None]:
        """Renew the claim three times a lease while the block runs."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(self.lease.total_seconds() / 3):
                # An S3 that is away for a while ends the lease at worst; the work goes on.
                with contextlib.suppress(Exception):
                    self.renew(name, key, run)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def fail(self, name: str, key: str, run: str, end: Ending) -> Claim:
        """Put down that the run failed, and whether it would fail again."""
        reason = f"{end.stage}: {end.reason}" if end.stage else end.reason
        claim = Claim(state="failed", until=_now(), reason=reason, lasting=end.lasting)
        self._write(name, key, run, claim)
        return claim

    def drop(self, name: str, key: str, run: str) -> None:
        """Take one claim back."""
        self._store.delete_text(f"{_prefix(name, key)}/{run}.json")

    def clear(self, name: str, key: str) -> None:
        """Forget every claim on an item: it is registered, or a person wants it tried again."""
        for run in self._read(name, key):
            self.drop(name, key, run)

    def _brought_up(self, name: str, key: str, run: str, claim: Claim) -> Claim | None:
        """Return the claim as it is to be read now; None where it is over, and dropped."""
        if claim.state == "failed":
            return claim
        end = ending(run, self._store) if claim.state == "working" else None
        if end is None and claim.live:
            return claim
        if claim.state == "asking" or (end and end.succeeded):
            # What succeeded is asked of the registry, where a person may have deleted it since.
            self.drop(name, key, run)
            return None
        unheard = Ending(succeeded=False, reason=f"the run {run} was not heard of again, and its lease is over")
        return self.fail(name, key, run, end or failure(run, self._store) or unheard)

    def _is_first(self, name: str, key: str, run: str) -> bool:
        # The times first: a claim that turns from asking to working in between is then read as working.
        taken = {file.removesuffix(".json"): at for file, at in self._store.texts(_prefix(name, key)).items()}
        if run not in taken:
            return False
        claims = self._read(name, key)
        if any(claim.state == "working" and claim.live for claim in claims.values()):
            return False
        # By S3's clock alone, since the watchers' own clocks may differ.
        askers = [
            (taken[other], other)
            for other, claim in claims.items()
            if claim.state == "asking" and other in taken and taken[other] > taken[run] - ASKING
        ]
        return min(askers, default=None) == (taken[run], run)

    def _read(self, name: str, key: str) -> dict[str, Claim]:
        """Every claim on the item by its run, oldest run first."""
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


def _now() -> datetime:
    return datetime.now(UTC)
