"""Disks that are full or read-only, as small file systems that are mounted for the test: one sentence, nothing lost, goes on when mended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.lib.errors import Unavailable, of_machine
from components.lib.store import store as stores
from components.lib.store.store import Store
from pipeline.services.embedded import services
from tests.faults.starved import MB, Unsupported, fill, mounted

LARGE = 4 * MB
"""Bytes of the file that finds no room."""


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk of 20 MB of its own."""
    try:
        with mounted(20 * MB) as place:
            yield place
    except Unsupported as reason:
        pytest.skip(str(reason))


def leave_a_megabyte(disk: Path) -> None:
    fill(disk, spare=MB)


def make_room(disk: Path) -> None:
    (disk / "filler").unlink()


def remount(way: str) -> Callable[[Path], None]:
    def mount(disk: Path) -> None:
        subprocess.run(["mount", "-o", f"remount,{way}", str(disk)], check=True)

    return mount


BROKEN = pytest.mark.parametrize(
    ("breaks", "mends"),
    [pytest.param(leave_a_megabyte, make_room, id="full"), pytest.param(remount("ro"), remount("rw"), id="read-only")],
)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with a large and a small file."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(LARGE))
    (folder / "config.json").write_text("{}")
    return folder


@BROKEN
def test_a_store_whose_disk_cannot_be_written_keeps_what_it_has_and_goes_on_when_mended(
    breaks: Callable[[Path], None],
    mends: Callable[[Path], None],
    disk: Path,
    folder: Path,
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none, so that none is started")
    home = tmp_path / "home"
    home.mkdir()
    # Its logs lie elsewhere: a disk with a file that is open for writing cannot be made read-only.
    (home / "s3").symlink_to(disk)
    with services(home) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = Store.from_environment()
        before = store.put(folder, "stages/prune/before")
        breaks(disk)
        with pytest.raises(Unavailable) as refusal:
            store.put(large, "stages/prune/large")
        assert "\n" not in str(refusal.value)
        assert store.find("stages/prune/large") is None
        store.verify(before)
        mends(disk)
        made = store.put(large, "stages/prune/large")
        copy = store.get(made, tmp_path / "copy")
        assert (copy / "model.safetensors").read_bytes() == (large / "model.safetensors").read_bytes()
        assert store.strangers(made) == []


@BROKEN
@pytest.mark.parametrize("seen", [True, False], ids=["before", "during the download"])
def test_a_download_to_a_disk_that_cannot_be_written_leaves_nothing_and_goes_on_when_mended(
    breaks: Callable[[Path], None],
    mends: Callable[[Path], None],
    seen: bool,
    disk: Path,
    large: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = store.put(large, "stages/prune/large")
    breaks(disk)
    with monkeypatch.context() as patch:
        if not seen:
            patch.setattr(stores, "need_space", lambda *_: None)
        with pytest.raises((Unavailable, OSError)) as error:
            store.get(made, disk / "copy")
    told = of_machine(error.value) if isinstance(error.value, OSError) else error.value
    assert "\n" not in str(told)
    assert "full" in str(told) or "free" in str(told) or "read-only" in str(told)
    assert [path.name for path in disk.iterdir() if path.name != "filler"] == []
    mends(disk)
    store.get(made, disk / "copy")


def test_a_home_that_is_read_only_is_told_in_one_sentence_and_starts_nothing(disk: Path) -> None:
    remount("ro")(disk)
    command = [sys.executable, "-m", "pipeline.cli.main", "services", "up", "--home", str(disk / "home")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    [said] = done.stderr.splitlines()
    assert said.startswith(
        f"espalier: the home {disk / 'home'} cannot be written to (Read-only file system): name another"
    )
    assert not list(disk.iterdir())
