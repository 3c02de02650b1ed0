"""Time the reconciler: from the move of an alias to the manifest of its version, whose files were verified in between.

    python -m benchmarks.reconciler --model smollm2-135m

`espalier deploy --watch` runs as a process of its own; two versions of the checkpoint are champion by turns. The services are
embedded ones in a folder that is removed afterwards.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.promotion import register
from components.lib.tracking import registry
from pipeline.runners.run import in_environment
from pipeline.services.embedded import services

NAME = "benchmark"
LONGEST = 300.0
"""Seconds to wait for a manifest."""


def main() -> None:
    """Move the alias again and again, and print the seconds until the manifest follows."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    arguments.add_argument("--repeats", type=int, default=20)
    arguments.add_argument("--every", type=float, default=1.0, help="seconds between two looks at the alias")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as home, services(Path(home)) as environment, in_environment(environment):
        versions = [register(given.model, number, Path(home)) for number in (1, 2)]
        delays = follow(versions, given.repeats, given.every, Path(home) / "champion.yaml")
    size = sum(path.stat().st_size for path in given.model.iterdir())
    print(
        f"{size / 1e6:.0f} MB, a look every {given.every:g} s: median {statistics.median(delays):.2f} s of {len(delays)}, "
        f"{min(delays):.2f} to {max(delays):.2f} s"
    )


def follow(versions: list[str], repeats: int, every: float, file: Path) -> list[float]:
    """Return the seconds from each move of the alias to its manifest; the first move, which starts the reconciler, does not count."""
    registry.set_alias(NAME, "champion", versions[-1])
    command = [sys.executable, "-m", "pipeline.cli.main", "deploy", f"{NAME}@champion", "--watch", f"--every={every}"]
    with subprocess.Popen([*command, "--out", str(file)], stdout=sys.stderr) as process:
        try:
            wait_for(versions[-1], file)
            delays = []
            for number in range(repeats):
                version = versions[number % len(versions)]
                # At another moment of the interval between two looks each time.
                time.sleep(every * (0.5 + number / repeats))
                began = time.perf_counter()
                registry.set_alias(NAME, "champion", version)
                wait_for(version, file)
                delays.append(time.perf_counter() - began)
            return delays
        finally:
            process.terminate()


def wait_for(version: str, file: Path) -> None:
    """Wait until the file is the manifest of the version. Raises TimeoutError if it does not become it."""
    deadline = time.monotonic() + LONGEST
    while not file.exists() or f"# {NAME} version {version}," not in file.read_text():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the manifest of version {version} was not written in {LONGEST:.0f} s")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
