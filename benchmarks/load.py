"""Time the commands that a user waits for beside a full store and a full registry.

    python -m benchmarks.load --model smollm2-135m      # 10,000 artifacts, 2,000 runs, 500 versions

One recompression is made, with a recipe that trains nothing. Then what it left is copied: its outputs in the store's folder, its runs and its
version in MLflow's database. The commands read everything through the two servers. Of each are told the seconds from its start to its end,
and those of the processor, of the command and its stages and of the servers. The services are embedded ones in a folder that is removed
afterwards. `--artifacts 0 --runs 0 --versions 0` times the commands beside nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil

from pipeline.demo.text import texts
from pipeline.services.embedded import BUCKET, Services

NAME = "benchmark"
LONGEST = 10.0
"""Seconds that a command may take."""

RECIPE = """
methods: {{last: {{ratio: 0.25}}}}
calibration: {{data: {text}, samples: 8, length: 32}}
regularize: {{schedule: none}}
evaluate: {{perplexity: {{test: {text}}}, controls: [], length: 32, speed: {{enabled: false}}}}
promote:
  rules:
    size: {{figure: parameters, bound: 0.99, why: it must be smaller}}
"""


def main() -> None:
    """Fill the store and the registry, time the commands, and print a line for each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    arguments.add_argument("--artifacts", type=int, default=10_000)
    arguments.add_argument("--runs", type=int, default=2_000, help="of MLflow, those of the stages among them")
    arguments.add_argument("--versions", type=int, default=500)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as made:
        home = Path(made) / "home"
        commands = prepared(Path(made), given.model.absolute(), home)
        services = Services(home)
        services.up()
        try:
            espalier(commands["run"], services)
            espalier(commands["watch"], services)
            services.down()
            fill_store(home / "s3" / BUCKET, given.artifacts, given.runs)
            fill_mlflow(home / "mlflow.db", given.runs, given.versions)
            services.up()
            for name, command in commands.items():
                print(f"{name}: {told(espalier(command, services))}", flush=True)
        finally:
            services.down()


def prepared(folder: Path, model: Path, home: Path) -> dict[str, list[str]]:
    """Write text, recipe and sources into the folder, and return the commands by name."""
    text, recipe = folder / "text.txt", folder / "recipe.yaml"
    text.write_text(texts(200_000, seed=0)["test"][:20_000])
    recipe.write_text(RECIPE.format(text=text))
    release = ["--model", str(model)]
    watched = ["--source", str(model), "--recipe", str(recipe)]
    arguments = {
        "run": ["run", str(recipe), *release, "--name", NAME],
        "models": ["models", NAME],
        "watch": ["watch", "--once", *watched, "--name", NAME],
    }
    return {
        name: [sys.executable, "-m", "pipeline.cli.main", *words, "--home", str(home)]
        for name, words in arguments.items()
    }


def espalier(command: list[str], services: Services) -> tuple[float, float, float]:
    """Run a command; return its seconds, and those of the processor, of the command and of the servers."""
    servers = [psutil.Process(one.pid) for one in services.status() if one.pid and one.running]
    before = sum(sum(server.cpu_times()[:2]) for server in servers)
    children = os.times()
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    now = os.times()
    own = now.children_user + now.children_system - children.children_user - children.children_system
    return seconds, own, sum(sum(server.cpu_times()[:2]) for server in servers) - before


def told(figures: tuple[float, float, float]) -> str:
    """Return the figures of a command in words."""
    seconds, own, servers = figures
    word = "" if seconds < LONGEST else f", longer than {LONGEST:.0f} s"
    return f"{seconds:.1f} s{word} (processor {own:.1f} s, servers {servers:.1f} s)"


def fill_store(bucket: Path, artifacts: int, runs: int) -> None:
    """Copy the outputs of all stages under new keys, and what a run left under new labels. The copies are links to the same files."""
    outputs = [path for stage in (bucket / "stages").iterdir() for path in stage.iterdir()]
    for path in islice(cycle(outputs), artifacts - len(outputs)):
        shutil.copytree(path, path.with_name(uuid.uuid4().hex * 2), copy_function=os.link)
    [run, *_] = sorted((bucket / "runs").iterdir())
    for _ in range(runs):
        shutil.copytree(run, run.with_name(f"{NAME}-{uuid.uuid4().hex}"), copy_function=os.link)


def fill_mlflow(database: Path, runs: int, versions: int) -> None:
    """Copy the runs of a recompression and its version until there are so many, in SQL."""
    with sqlite3.connect(database) as connection:
        connection.row_factory = sqlite3.Row
        groups = (_renamed_runs(connection) for _ in iter(int, 1))
        while _count(connection, "runs") < runs:
            names = next(groups)
            for table in ("runs", "tags", "params", "metrics", "latest_metrics"):
                copy_rows(connection, table, "run_uuid", names)
        for number in range(_count(connection, "model_versions") + 1, versions + 1):
            digest = uuid.uuid4().hex * 2
            renamed: dict[Any, Any] = {1: number}
            copy_rows(connection, "model_versions", "version", renamed)
            copy_rows(connection, "model_version_tags", "version", renamed, partial(_another, digest=digest))
    connection.close()


def _renamed_runs(connection: sqlite3.Connection) -> dict[Any, Any]:
    """Return a new id for each run of the first recompression, and a new label for its own."""
    first = connection.execute("SELECT value FROM tags WHERE key = 'espalier.run' ORDER BY run_uuid LIMIT 1").fetchone()
    label = first["value"]
    rows = connection.execute(
        "SELECT run_uuid FROM tags WHERE key IN ('espalier.run', 'espalier.stage_of') AND value = ?", (label,)
    )
    names: dict[Any, Any] = {row["run_uuid"]: uuid.uuid4().hex for row in rows}
    return names | {label: f"{NAME}-{uuid.uuid4().hex}"}


def _another(row: dict[str, Any], digest: str) -> dict[str, Any]:
    """Return a tag of a version as another version has it: its own checkpoint, and its own item."""
    if row["key"] == "sha256.checkpoint":
        return row | {"value": digest}
    return row | {"key": f"sha256.item.{digest}"} if row["key"].startswith("sha256.item.") else row


def copy_rows(
    connection: sqlite3.Connection,
    table: str,
    key: str,
    names: Mapping[Any, Any],
    changed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Copy the rows whose `key` is one of the names, with each value that is a name replaced, and then as `changed` returns them."""
    marks = ", ".join("?" * len(names))
    rows: Iterable[sqlite3.Row] = connection.execute(
        f"SELECT * FROM {table} WHERE {key} IN ({marks})", tuple(names)
    ).fetchall()
    for row in map(dict, rows):
        copied = changed(row | {column: names[row[column]] for column in (key, "value") if row.get(column) in names})
        columns = ", ".join(f'"{column}"' for column in copied)
        connection.execute(
            f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(copied))})", tuple(copied.values())
        )


def _count(connection: sqlite3.Connection, table: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


if __name__ == "__main__":
    main()
