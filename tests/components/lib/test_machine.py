"""The memory that a process may take, by the files of its cgroup."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from components.lib import machine

GB = 10**9


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GB, 32 of them free, with no group but those that a test makes."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    memory = type("Memory", (), {"total": 64 * GB, "available": 32 * GB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


def sizes() -> tuple[float, float]:
    return machine.memory_size() / GB, machine.free_memory() / GB


def test_without_a_group_it_is_the_machines(tmp_path: Path) -> None:
    assert sizes() == (64, 32)
    (tmp_path / "own").write_text("0::/\n")
    assert sizes() == (64, 32)


def test_a_group_around_the_own_one_limits_too(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/jobs/7\n")
    group(tmp_path / "jobs", max=20 * GB, current=17 * GB, stat=f"anon 5\ninactive_file {2 * GB}")
    group(tmp_path / "jobs" / "7", max="max", current=8 * GB)
    assert sizes() == (20, 5)


def test_version_1_has_other_names_and_a_container_sees_its_group_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n")
    stat = f"inactive_file 1\ntotal_inactive_file {GB}"
    group(tmp_path / "memory", limit_in_bytes=4 * GB, usage_in_bytes=3 * GB, stat=stat)
    assert sizes() == (4, 2)
