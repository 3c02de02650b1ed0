"""The device that models run on, and its memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""

_blocks = 0
"""How many `reused_memory` blocks are open in this process."""


def best_device() -> torch.device:
    """Return the accelerator of this machine, or its processor if it has none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def reused_memory(device: torch.device) -> Iterator[None]:
    """Reuse the memory of freed tensors on the processor within the block, and return it to the system at its end.

    glibc maps every large tensor anew and unmaps it when it is freed, so every step faults its activations in page by page: a
    fifth of the time of training a small model on two cores. Blocks may be nested. On another device, or with another C library,
    this does nothing.
    """
    global _blocks
    libc = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(libc, "mallopt"):
        yield
        return
    _blocks += 1
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _blocks -= 1
        if not _blocks:
            # The values that glibc itself reaches in a process that frees large blocks.
            libc.mallopt(MMAP_MAX, 65_536)
            libc.mallopt(MMAP_THRESHOLD, 32 * 2**20)
            libc.mallopt(TRIM_THRESHOLD, 64 * 2**20)
            libc.malloc_trim(0)
