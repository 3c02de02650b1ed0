"""Whole runs without memory or disk: a cgroup whose limit falls in a stage, and a small file system that is full."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from components.lib.store.runs import newest_stage
from pipeline.services.embedded import Services
from tests.faults.store_round import opened
from tests.faults.whole_run import LONGEST, Bench, again, seconds_of

CGROUPS = Path("/sys/fs/cgroup")

SAYS = {
    "regularize": "set regularize.micro_batch_size to auto",
    "prune": "it holds whole models: give it more",
    "evaluate": "lower evaluate.batch_size",
}
"""What the command says to lower, by the stage that has too little memory."""

MB = 2**20
DISK = 300 * MB


class Unsupported(Exception):
    """This machine allows no cgroup, or no mount."""


@dataclass(frozen=True)
class Group:
    """A cgroup with a limit of memory."""

    folder: Path
    limit: str
    used: str

    def add(self, pid: int) -> None:
        """Move a process into the group; those that it starts are in it too."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def feed(self) -> None:
        """Take the limit away."""
        (self.folder / self.limit).write_text("max" if self.limit == "memory.max" else "-1")

    def starve(self) -> None:
        """Leave a megabyte more than is used now."""
        for spare in range(1, 100):
            used = int((self.folder / self.used).read_text())
            # Version 1 refuses a limit below the use, which may have grown since.
            with suppress(OSError):
                (self.folder / self.limit).write_text(str(used + spare * MB))
                return
        raise Unsupported("the group takes no limit")


@contextmanager
def group() -> Iterator[Group]:
    """Make a cgroup, and remove it when its processes have ended. Raises Unsupported if that is not allowed."""
    one = (CGROUPS / "memory").is_dir()
    folder = (CGROUPS / "memory" if one else CGROUPS) / f"espalier-faults-{uuid.uuid4().hex}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if one else ("memory.max", "memory.current")
    try:
        folder.mkdir()
    except OSError as error:
        raise Unsupported(f"no cgroup can be made here ({error})") from None
    try:
        if not (folder / names[0]).exists():
            raise Unsupported("the cgroups here have no memory controller")
        yield Group(folder, *names)
    finally:
        folder.rmdir()


def memory_round(seed: int, bench: Bench) -> dict[str, Any]:
    """Take the memory away in one stage of a run, then give the command again with enough of it."""
    stage = list(SAYS)[seed % len(SAYS)]
    environment = bench.own()
    store = opened(environment, environment["AWS_ENDPOINT_URL_S3"], environment["ESPALIER_BUCKET"].partition("/")[2])
    try:
        with group() as held:
            process = bench.start("quarter", environment)
            held.add(process.pid or 0)
            while process.is_alive() and stage not in [newest_stage(run, store) for run in store.folders("runs")]:
                time.sleep(0.1)
            with suppress(psutil.Error, OSError):
                stages = psutil.Process(process.pid).children()
                # The stage is to be killed, not the runner that tells of it, nor the stage that closes the run.
                for child in stages:
                    Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000")
                held.starve()
                psutil.wait_procs(stages, timeout=LONGEST)
            held.feed()
            process.join(LONGEST)
    except Unsupported as reason:
        return {"held": False, "wrong": f"skipped: {reason}"}
    said = bench.said(environment)
    figures = again(bench, environment, ["quarter"], [process], faults=1)
    if figures["held"] and SAYS[stage] not in said:
        return figures | {"held": False, "wrong": f"without memory in {stage} the command said {said[-300:]}"}
    return figures


@contextmanager
def mounted(size: int) -> Iterator[Path]:
    """Mount a file system of so many bytes. Raises Unsupported if that is not allowed."""
    with tempfile.TemporaryDirectory(prefix="espalier-faults-") as made:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", made]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unsupported(f"no file system can be mounted here ({done.stderr.strip()})")
        try:
            yield Path(made)
        finally:
            subprocess.run(["umount", "--lazy", made], check=True)


def fill(disk: Path, spare: int) -> None:
    """Leave so many bytes free, by a file called `filler`."""
    found = os.statvfs(disk)
    # Others write there too, and may take the last of the room.
    with suppress(OSError), (disk / "filler").open("wb") as file:
        file.write(b"\0" * max(0, found.f_bavail * found.f_bsize - spare))


def disk_round(seed: int, bench: Bench) -> dict[str, Any]:
    """Fill the disk of a home, with both servers' files, at a moment of a run; then make room, and give the command again."""
    dice = random.Random(f"{seed} disk")
    moment = dice.uniform(0, bench.undisturbed("quarter")[1])
    try:
        with mounted(DISK) as disk:
            for file in ("release", "quarter.yaml"):
                (disk / file).symlink_to(bench.folder / file)
            services = Services(disk / "home")
            small = replace(bench, folder=disk, services=services, environment=services.up())
            try:
                environment = small.own()
                process = small.start("quarter", environment)
                while process.is_alive() and seconds_of(process.pid or 0) < moment:
                    time.sleep(0.02)
                fill(disk, spare=dice.randrange(MB // 4))
                process.join(LONGEST)
                (disk / "filler").unlink()
                return again(small, environment, ["quarter"], [process], faults=1)
            finally:
                services.down()
    except Unsupported as reason:
        return {"held": False, "wrong": f"skipped: {reason}"}
