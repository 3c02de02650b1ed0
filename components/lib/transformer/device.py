"""The device that models run on, and its memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""

_blocks = 0
"""How many `reused_memory` blocks are open in this process."""


def best_device() -> torch.device:
    """Return the accelerator of this machine, or its processor if it has none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_in_bf16(device: torch.device) -> bool:
    """Return True if the device computes in bf16 natively; emulated bf16 is slower than fp32, on a processor ten times and more."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def emulated_types(device: torch.device) -> set[torch.dtype]:
    """Return the types of 16 bits in which a processor computes by emulation only."""
    if device.type != "cpu":
        return set()
    return {torch.float16} if computes_in_bf16(device) else {torch.float16, torch.bfloat16}


def raise_weights(model: nn.Module) -> list[tuple[nn.Parameter, torch.dtype]]:
    """Raise a model's weights to fp32 if it is on a processor that computes in their type by emulation only; return them with that type."""
    raised = [(weight, weight.dtype) for weight in model.parameters() if weight.dtype in emulated_types(weight.device)]
    for weight, _ in raised:
        weight.data = weight.data.float()
    return raised


@contextmanager
def computable(model: nn.Module | None) -> Iterator[None]:
    """Hold a model's weights as `raise_weights` does within the block, and in their own types again behind it; None is no model."""
    raised = raise_weights(model) if model else []
    try:
        yield
    finally:
        for weight, dtype in raised:
            weight.data = weight.data.to(dtype)


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
