"""The memory of this machine that a process may take: the system's, or that of the process's cgroup if it is less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
"""The groups that this process is in: a line for each, such as `4:memory:/jobs/7`, or `0::/jobs/7` for version 2."""


def memory_size() -> int:
    """Return the bytes that the processes of this container or machine may take together."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """Return the bytes that can still be taken. Files that the system keeps in memory count as free: it drops them first."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _limits())]))


def _limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of each group around this process that has a limit."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _limits_of(CGROUPS / "memory", path, *names)
        elif not controllers:
            yield from _limits_of(CGROUPS, path, "memory.max", "memory.current", "inactive_file")


def _limits_of(mount: Path, path: str, limit: str, used: str, files: str) -> Iterator[tuple[int, int]]:
    # A container sees its own group as the mount itself, at another path than that which the file of the process names.
    group = mount / path.lstrip("/")
    for place in (group, *group.parents):
        if place.is_relative_to(mount) and (text := _read(place / limit)).isdecimal():
            kept = dict(line.split() for line in _read(place / "memory.stat").splitlines()).get(files, "0")
            yield int(text), int(_read(place / used) or 0) - int(kept)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
