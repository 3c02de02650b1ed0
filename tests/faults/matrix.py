"""The fault matrix: run rounds of each row, keep their figures, and write the table of docs/reliability.md.

    python -m tests.faults.matrix                              # every round that has not held yet
    python -m tests.faults.matrix --rows store --most 20       # twenty of them, of one row
    python -m tests.faults.matrix --table                      # the table alone, from the figures that are there

Each finished round adds a line to docs/reliability.jsonl, so that a matrix that was stopped goes on. A round is its row and its
seed: `--rows store --seed 17` runs one again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.services.embedded import services
from tests.faults.starved import disk_round, memory_round
from tests.faults.store_round import store_round
from tests.faults.watchers import watchers_round
from tests.faults.whole_run import bench, faults_round, kill_round, together_round

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = DOCS / "reliability.jsonl"
PAGE = DOCS / "reliability.md"
TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)

Figures = Mapping[str, Any]
"""Of a round: `held`, whether every promise did, and what else the row counts."""


@dataclass(frozen=True)
class Row:
    """One row of the matrix."""

    title: str
    goal: str
    rounds: int
    """The rounds that the whole matrix has."""
    bench: Callable[[], Any]
    """Opens what all rounds of the row share, as a context."""
    run: Callable[[int, Any], Figures]
    """Runs the round with this seed."""
    at_once: int = 1
    """How many rounds may run at the same time."""


def _store(seed: int, environment: Mapping[str, str]) -> Figures:
    ended = store_round(seed, environment)
    return {"held": not ended.wrong, "tries": ended.tries, "faults": sum(ended.faults.values()), "wrong": ended.wrong}


@contextmanager
def _s3() -> Iterator[Mapping[str, str]]:
    """An S3 server without MLflow."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = "none, so that none is started"
    try:
        with tempfile.TemporaryDirectory(prefix="espalier-faults-") as home, services(Path(home)) as environment:
            yield environment
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


ROWS = {
    "store": Row(
        "S3 faults in put, find and get",
        "nothing partial read as whole, no wrong byte, no orphan taken",
        200,
        _s3,
        _store,
        at_once=6,
    ),
    **{
        f"kill-{victim}": Row(
            f"`kill -9` of {words} at a random moment of a run",
            "same digest after the same command; one version",
            50,
            bench,
            lambda seed, opened, victim=victim: kill_round(seed, opened, victim),
            at_once=at_once,
        )
        for victim, words, at_once in (
            ("stage", "the stage", 2),
            ("runner", "the runner", 2),
            ("s3", "the S3 server", 1),
            ("mlflow", "MLflow", 1),
        )
    },
    **{
        f"{of}-run": Row(
            f"{words} faults in whole runs",
            goal,
            20,
            bench,
            lambda seed, opened, of=of: faults_round(seed, opened, of),
            2,
        )
        for of, words, goal in (
            ("s3", "S3", "same digest; every artifact whole"),
            ("mlflow", "MLflow", "nothing registered twice; curves whole"),
        )
    },
    "memory": Row(
        "no memory (a cgroup's limit) in training, export, evaluation",
        "says what to lower; same digest after the same command",
        9,
        bench,
        memory_round,
    ),
    "disk": Row(
        "the disk full at a random moment of a run",
        "one sentence; same digest after the same command, when there is room",
        10,
        bench,
        disk_round,
    ),
    "watchers": Row(
        "two to five watchers, killed in between, clocks apart by 10 minutes",
        "each release done once, by one at a time while leases are kept",
        50,
        bench,
        watchers_round,
    ),
    **{
        name: Row(words, goal, 10, bench, lambda seed, opened, recipes=recipes: together_round(seed, opened, recipes))
        for name, words, goal, recipes in (
            ("two", "two identical runs at once", "one version, aliases whole", ["quarter"] * 2),
            ("four", "four identical runs at once", "one version, aliases whole", ["quarter"] * 4),
            (
                "different",
                "two different runs at once under one name",
                "one version for each result",
                ["quarter", "half"],
            ),
        )
    },
}


def main(given: Sequence[str] | None = None) -> None:
    """Run what is asked for, and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    arguments.add_argument("--most", type=int, help="rounds of each row that this command runs at most")
    arguments.add_argument("--seed", type=int, help="run this one round, even if it held before")
    arguments.add_argument("--table", action="store_true", help="run nothing")
    chosen = arguments.parse_args(given)
    if not chosen.table:
        for shared in dict.fromkeys(ROWS[name].bench for name in chosen.rows):
            with shared() as opened:
                for name in chosen.rows:
                    if ROWS[name].bench is shared:
                        run_row(
                            name,
                            [chosen.seed] if chosen.seed is not None else left(name, figures())[: chosen.most],
                            opened,
                        )
    print(write_table(figures()))


def run_row(name: str, seeds: Sequence[int], opened: Any) -> None:
    """Run rounds of one row, and keep the figures of each as soon as it ends."""
    with ThreadPoolExecutor(ROWS[name].at_once) as threads:
        for figure in threads.map(lambda seed: _timed(name, seed, opened), seeds):
            with FIGURES.open("a") as file:
                file.write(json.dumps(figure) + "\n")
            print(json.dumps(figure), flush=True)


def _timed(name: str, seed: int, opened: Any) -> dict[str, Any]:
    began = time.monotonic()
    figure = ROWS[name].run(seed, opened)
    return {"row": name, "seed": seed, **figure, "seconds": round(time.monotonic() - began, 1)}


def figures() -> dict[str, dict[int, Figures]]:
    """Return the newest figures of each round, by row and seed."""
    found: dict[str, dict[int, Figures]] = {name: {} for name in ROWS}
    for line in FIGURES.read_text().splitlines() if FIGURES.exists() else ():
        figure = json.loads(line)
        found.setdefault(figure["row"], {})[figure["seed"]] = figure
    return found


def left(name: str, have: Mapping[str, Mapping[int, Figures]]) -> list[int]:
    """Return the seeds of a row that have not held yet."""
    return [seed for seed in range(ROWS[name].rounds) if not have[name].get(seed, {"held": False})["held"]]


def write_table(have: Mapping[str, Mapping[int, Figures]]) -> str:
    """Write the table into the page, and return it."""
    lines = [
        "| broken on purpose | goal | rounds run, of | held | faults | most tries | seconds a round |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        ran = list(have[name].values())
        held = sum(figure["held"] for figure in ran)
        faults = sum(figure.get("faults", 0) for figure in ran)
        tries = max((figure.get("tries", 1) for figure in ran), default="–")
        seconds = f"{sum(figure['seconds'] for figure in ran) / len(ran):.0f}" if ran else "–"
        lines.append(
            f"| {row.title} | {row.goal} | {len(ran)}, {row.rounds} | {held} | {faults} | {tries} | {seconds} |"
        )
    table = "\n".join(lines) + "\n"
    PAGE.write_text(TABLE.sub(lambda match: match[1] + table + match[2], PAGE.read_text()))
    return table


if __name__ == "__main__":
    main()
