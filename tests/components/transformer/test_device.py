"""Memory that tensors free is reused within a block, and handed back after it."""

from __future__ import annotations

import ctypes
import resource

import pytest
import torch

from components.transformer.device import reused_memory

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")


def _faults() -> int:
    """Make and free a tensor of 64 MiB twenty times, and return the page faults that it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_pages_are_faulted_in_once_in_a_block_and_at_every_use_outside() -> None:
    outside = _faults()
    with reused_memory(CPU):
        inside = _faults()
    assert inside < outside / 5
    assert _faults() > outside / 2


def test_an_inner_block_does_not_end_the_outer_one() -> None:
    outside = _faults()
    with reused_memory(CPU):
        with reused_memory(CPU):
            torch.ones(2**24)
        assert _faults() < outside / 5


def test_a_block_that_raises_hands_its_memory_back() -> None:
    outside = _faults()
    with pytest.raises(RuntimeError):
        _raise_within()
    assert _faults() > outside / 2


def _raise_within() -> None:
    with reused_memory(CPU):
        torch.ones(2**24)
        raise RuntimeError
