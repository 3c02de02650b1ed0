"""Errors of the machine as sentences that say what to mend."""

from __future__ import annotations

import errno
import re
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from components.lib.errors import Refusal, of_machine


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/home/x"), "the disk is full for /home/x"),
        (OSError(errno.EROFS, "Read-only file system", "/home/x"), "the disk is read-only for /home/x"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "the permission is missing for /x"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), "the disk is full"),
        (MemoryError(), r"the memory is used up \(MemoryError\): set micro_batch_size of the stage\'s section to auto"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the memory is used up"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "the memory is"),
    ],
)
def test_an_error_of_the_machine_says_what_to_mend(error: Exception, says: str) -> None:
    told = of_machine(error)
    assert isinstance(told, Refusal)
    assert "\n" not in str(told)
    assert re.match(says, str(told))


@pytest.mark.parametrize(
    "error", [KeyError("layer"), FileNotFoundError(errno.ENOENT, "No such file", "x"), ValueError()]
)
def test_any_other_error_is_none(error: Exception) -> None:
    assert of_machine(error) is None


def small(code: str, limit: int) -> subprocess.CompletedProcess[str]:
    """Run a line of Python in a process that may write files of `limit` bytes at most, as a disk that is full may."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_the_command_line_prints_one_sentence_for_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import sys; from pipeline.cli import main\n"
        f"sys.argv = ['espalier', 'services', 'up', '--home', {str(tmp_path / 'home')!r}]\n"
        "main.main()"
    )
    done = small(code, 10)
    assert done.returncode == 1
    assert done.stderr.startswith("espalier: the file is larger than the system allows")
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "home").glob("services.json*"))
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or [])]
