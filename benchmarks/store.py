"""Compare the store's `put` and `get` with `rclone copy` of the same bytes to and from the same server, in turns.

    python -m benchmarks.store                                # one file of 128 MB, 1,000 of 4 kB, 8 of 16 MB
    python -m benchmarks.store --big 4000 --shard 500         # as large as checkpoints are

The server is the embedded S3, in a folder that is removed afterwards. A ratio above 1 means that the store is faster. The start of
rclone's process counts, because a user waits for it; so do the store's hashes and checks, which rclone does without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from components.lib.store.store import Store
from pipeline.runners.run import in_environment
from pipeline.services.embedded import services

MB = 10**6


def main() -> None:
    """Measure each shape, and print a line for each direction."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--big", type=int, default=128, help="MB of the one big file")
    arguments.add_argument("--small", type=int, default=1000, help="how many small files")
    arguments.add_argument("--small-size", type=int, default=4, help="kB of each")
    arguments.add_argument("--shards", type=int, default=8, help="how many shards")
    arguments.add_argument("--shard", type=int, default=16, help="MB of each")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument(
        "--folder", type=Path, help="where the bytes and the server's files lie; the system's own if absent"
    )
    given = arguments.parse_args()
    shapes = {
        f"one file of {given.big} MB": (1, given.big * MB),
        f"{given.small} files of {given.small_size} kB": (given.small, given.small_size * 1000),
        f"{given.shards} shards of {given.shard} MB": (given.shards, given.shard * MB),
    }
    for name, (count, size) in shapes.items():
        if count and size:
            with server(given.folder) as environment:
                measure(name, count, size, given.repeats, environment, given.folder)


@contextmanager
def server(folder: Path | None) -> Iterator[Mapping[str, str]]:
    """Start the embedded S3 alone, and name it in the environment."""
    alone = {"MLFLOW_TRACKING_URI": "none, so that none is started"}
    with (
        tempfile.TemporaryDirectory(dir=folder) as home,
        in_environment(alone),
        services(Path(home)) as environment,
        in_environment(environment),
    ):
        yield environment


def measure(
    name: str, count: int, size: int, repeats: int, environment: Mapping[str, str], folder: Path | None
) -> None:
    """Print how many MB a second the store and rclone move, and the ratio of the two, as medians over the repeats."""
    store = Store.from_environment()
    seconds: dict[str, list[float]] = {"put": [], "rclone up": [], "get": [], "rclone down": []}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for turn in range(repeats):
            source = Path(scratch) / f"source-{turn}"
            source.mkdir()
            for number in range(count):
                (source / f"{number:05d}.safetensors").write_bytes(os.urandom(size))
            there = f"there:{store.bucket}/rclone-{turn}"
            # In turns, so that what else the machine does touches both.
            with timed(seconds["put"]):
                reference = store.put(source, f"stages/benchmark/{turn}")
            with timed(seconds["rclone up"]):
                rclone(environment, str(source), there)
            with timed(seconds["get"]):
                store.get(reference, Path(scratch) / f"got-{turn}")
            with timed(seconds["rclone down"]):
                rclone(environment, there, f"{scratch}/copied-{turn}")
    for ours, theirs in (("put", "rclone up"), ("get", "rclone down")):
        ratios = [theirs_ / ours_ for ours_, theirs_ in zip(seconds[ours], seconds[theirs], strict=True)]
        speeds = [count * size / MB / statistics.median(seconds[way]) for way in (ours, theirs)]
        print(
            f"{name}, {ours}: {speeds[0]:.0f} MB/s, rclone copy {speeds[1]:.0f} MB/s: {statistics.median(ratios):.2f}× "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {repeats} repeats)",
            flush=True,
        )


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Add the seconds that the block takes."""
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)


def rclone(environment: Mapping[str, str], source: str, target: str) -> None:
    """Copy a folder to or from the server called `there`, with rclone's own defaults."""
    named = {
        "RCLONE_CONFIG_THERE_TYPE": "s3",
        "RCLONE_CONFIG_THERE_PROVIDER": "Other",
        "RCLONE_CONFIG_THERE_ENDPOINT": environment["AWS_ENDPOINT_URL_S3"],
        "RCLONE_CONFIG_THERE_ACCESS_KEY_ID": environment["AWS_ACCESS_KEY_ID"],
        "RCLONE_CONFIG_THERE_SECRET_ACCESS_KEY": environment["AWS_SECRET_ACCESS_KEY"],
        "RCLONE_CONFIG_THERE_REGION": environment["AWS_DEFAULT_REGION"],
    }
    command = [f"{sysconfig.get_path('scripts')}/rclone", "copy", "--config", "", source, target]
    subprocess.run(command, env={**os.environ, **named}, check=True)


if __name__ == "__main__":
    main()
