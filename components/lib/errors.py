"""The exceptions that the command line reports as sentences."""

from __future__ import annotations

import errno


class Refusal(Exception):
    """An error that the user can correct.

    The message is one sentence that names the field or the file, the value found there, and the cure. The command line
    prints it without a traceback; every other exception is an error of this program or of the machine, and keeps its traceback.
    """


class Unavailable(Refusal):
    """A refusal that may be temporary: a service that does not answer, a disk that is full, access not yet granted.

    Every other refusal lasts until the release, the recipe or the code changes, so a watcher does not retry it.
    """


class StageFailed(Exception):
    """A stage of the pipeline failed with an error that the user cannot correct."""


def refusal_from(text: str) -> Refusal | None:
    """Return the refusal that another process reported as `Type: message`; None if it reported anything else."""
    for kind in (Unavailable, Refusal):
        if text.startswith(f"{kind.__name__}: "):
            return kind(text.removeprefix(f"{kind.__name__}: "))
    return None


_DISK = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk's quota is used up", "make room"),
    errno.EROFS: ("the disk is read-only", "name another folder"),
    errno.EACCES: ("the permission is missing", "give it"),
    errno.EPERM: ("the permission is missing", "give it"),
    errno.EFBIG: ("the file is larger than the system allows", "raise that limit"),
}
_FULL = ("no space left on device", "disk is full")
"""What libraries say that raise no OSError for a full disk: safetensors, SQLite, Arrow."""
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "unable to allocate")
"""What torch and numpy say if an allocation fails, on a GPU or on the processor."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on the processor."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _MEMORY)


def of_machine(error: BaseException) -> Unavailable | None:
    """Return the sentence for an error of the machine: its disk, a permission, its memory. None for every other error.

    The same command goes on when it is mended.
    """
    said = " ".join(str(error).split())[:200]
    if isinstance(error, OSError) and error.errno in _DISK:
        wrong, cure = _DISK[error.errno]
        where = f" for {error.filename}" if error.filename else ""
        return Unavailable(
            f"{wrong}{where} ({said}): {cure} and start again, with --home or ESPALIER_SCRATCH elsewhere if need be"
        )
    if any(words in said.lower() for words in _FULL):
        return Unavailable(f"the disk is full ({said}): make room and start again")
    if out_of_memory(error):
        return Unavailable(
            f"the memory is used up ({said or 'MemoryError'}): set micro_batch_size of the stage's section to auto, lower its batch_size or "
            "length, or set regularize.gradient_checkpointing to true; espalier plan says what each stage needs"
        )
    return None
