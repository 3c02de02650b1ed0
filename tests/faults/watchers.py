"""Several watchers of one list, killed in between, their clocks apart: each release is done once, by one at a time while leases are kept.

The watchers, the claims, the store and the registry are the real ones. The recompression is replaced by some seconds of sleep and
a version whose digest is new each time, so that work that was done twice is seen as two versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Mapping
from datetime import datetime, timedelta, tzinfo
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow import MlflowClient
from rich.console import Console

from components.lib.store import claims
from components.lib.store import store as stores
from components.lib.store.runs import item_of
from components.lib.store.store import Reference, Store
from components.lib.tracking import registry, runs, trail
from components.watch.find import Watched
from pipeline.runners import watch
from tests import forked
from tests.faults.store_round import opened
from tests.faults.whole_run import Bench

RELEASES = 2
APART = 600.0
"""Seconds between the clocks that differ most."""
LEASE = timedelta(seconds=9)
"""Renewed every three seconds, so that the item of a killed watcher is soon free."""
KILLS = 2
"""Fewer than the attempts after which an item is given up."""
LONGEST = 900.0

RECIPE = """
methods: {last: {ratio: 0.25}}
calibration: {data: TEXT, length: 16}
regularize: {schedule: none}
evaluate: {perplexity: {text: TEXT}}
"""


def watchers_round(seed: int, bench: Bench) -> dict[str, Any]:
    """Start two to five watchers, kill some and start them again, until each has seen that every release is registered."""
    dice = random.Random(f"{seed} watchers")
    environment = bench.own()
    home = bench.folder / "homes" / environment["ESPALIER_ROUND"]
    home.mkdir(parents=True)
    store = opened(environment, environment["AWS_ENDPOINT_URL_S3"], environment["ESPALIER_BUCKET"].partition("/")[2])
    for number in range(RELEASES):
        store.write_text(f"release-{number}/config.json", "{}")
    several = dice.randint(2, 5)
    clocks = [-APART / 2, APART / 2, *(dice.uniform(-APART / 2, APART / 2) for _ in range(several - 2))]

    def start(number: int) -> Any:
        arguments = (str(bench.folder / "train.txt"), clocks[number], dice.random())
        return forked.call(_watch, arguments, environment, home / "out.txt")

    watchers = {number: start(number) for number in range(several)}
    killed: dict[int, float] = {}
    moments = sorted(time.monotonic() + dice.uniform(0, 12) for _ in range(dice.randint(1, KILLS)))
    deadline = time.monotonic() + LONGEST
    while any(one.is_alive() for one in watchers.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
        if moments and time.monotonic() > moments[0]:
            moments.pop(0)
            number = dice.choice(sorted(watchers))
            if watchers[number].is_alive():
                watchers[number].kill()
                watchers[number].join()
                killed[watchers[number].pid or 0] = time.monotonic()
                watchers[number] = start(number)
    wrong = _differs(environment, store, killed)
    if any(one.exitcode != 0 for one in watchers.values()):
        wrong = wrong or f"a watcher did not end well: {(home / 'out.txt').read_text()[-300:]}"
        for one in watchers.values():
            one.kill()
    return {"held": not wrong, "faults": len(killed), "watchers": several, "wrong": wrong}


def _differs(environment: Mapping[str, str], store: Store, killed: Mapping[int, float]) -> str:
    """Return which release was not done once, or was worked on by two at a time; nothing if all is as promised."""
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    found = client.search_model_versions(f"name = '{environment['ESPALIER_ROUND']}'")
    made = sorted(version.tags["release"] for version in found)
    expected = sorted(store.uri(f"release-{number}") for number in range(RELEASES))
    if made != expected:
        return f"the versions are of {made}, not of each release once"
    works: dict[str, list[tuple[float, float, int, list[tuple[float, float]]]]] = {}
    for name, *_ in store.objects("work"):
        work = json.loads(store.read_text(name) or "{}")
        over = work.get("ended", killed.get(work["pid"], float("inf")))
        renewed = json.loads(store.read_text(f"renewed/{name.removeprefix('work/')}") or "[]")
        works.setdefault(work["release"], []).append((work["begun"], over, work["pid"], renewed))
    for release, intervals in works.items():
        intervals.sort()
        for (_, over, first, renewed), (begun, _, second, _) in pairwise(intervals):
            kept = max((ends for written, ends in renewed if written < begun), default=0.0)
            # S3's clock counts whole seconds.
            if begun < min(over, kept - 1):
                return f"{release} was worked on by {first} and {second} at a time"
    return ""


def _watch(text: str, clock: float, dice: float) -> None:
    """Watch until every release is registered, with a clock that is `clock` seconds ahead. Runs in a process of its own."""
    _shift(clock)
    store, draw = Store.from_environment(), random.Random(dice)
    watch.LEASE = LEASE
    _note_leases(store)

    def work(recipe: Any, release: str, name: str, home: Path, console: Console, label: str) -> Any:
        mark = {"release": release, "pid": os.getpid(), "begun": time.monotonic()}
        store.write_text(f"work/{label}", json.dumps(mark))
        time.sleep(draw.uniform(0.5, 4))
        digest = hashlib.sha256(label.encode()).hexdigest()
        tags = {"release": release, f"{registry.ITEM}.{item_of(label, store)}": "made"}
        version = registry.register_version(
            name, Reference(store.uri(f"stages/prune/{digest}"), digest), runs.open_parent(label, {}, {}), tags
        )
        store.write_text(f"work/{label}", json.dumps(mark | {"ended": time.monotonic()}))
        verdict = SimpleNamespace(passed=True)
        return SimpleNamespace(report=SimpleNamespace(registered=version, verdict=verdict), folder=home)

    watch.run = work  # type: ignore[assignment]
    name = os.environ["ESPALIER_ROUND"]
    sources = [
        Watched(release=store.uri(f"release-{number}"), name=name, recipe=RECIPE.replace("TEXT", text))
        for number in range(RELEASES)
    ]
    draw.shuffle(sources)
    while True:
        outcomes = watch.watch_once(sources, 1, Path("/nonexistent"), Console(quiet=True))
        if all(one.state in {"registered", "pass"} for one in outcomes):
            return
        if any(one.state in {"failed", "refused"} for one in outcomes):
            raise SystemExit(f"a watcher ended with {outcomes}")
        time.sleep(0.5)


def _note_leases(store: Store) -> None:
    """Record of each claim that says `working` when it is written and when its lease ends, by this machine's own seconds."""
    write = claims.Claims._write
    written: dict[str, list[tuple[float, float]]] = {}

    def noted(self: claims.Claims, name: str, key: str, run: str, claim: claims.Claim) -> None:
        now, left = time.monotonic(), (claim.until - store.clock()).total_seconds()
        write(self, name, key, run, claim)
        if claim.state == "working":
            written.setdefault(run, []).append((now, now + left))
            store.write_text(f"renewed/{run}", json.dumps(written[run]))

    claims.Claims._write = noted  # type: ignore[method-assign]


def _shift(seconds: float) -> None:
    """Let this process's clock be so many seconds ahead, wherever our code and Python's libraries read it."""
    there = time.time

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=seconds)

    time.time = lambda: there() + seconds
    for module in (claims, stores, trail):
        module.datetime = Shifted  # type: ignore[attr-defined]
