"""Memory that tensors free is reused within a block, and handed back after it."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")

SCRIPT = """
import json, resource, psutil, torch
from components.lib.transformer.device import reused_memory

CPU = torch.device("cpu")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss

seen = {"outside": faults()}
try:
    with reused_memory(CPU):
        with reused_memory(CPU):
            faults()
            seen["inside"] = faults()
        seen["behind an inner block"] = faults()
        held = resident()
        raise RuntimeError
except RuntimeError:
    seen["handed back"] = held - resident()
print(json.dumps(seen))
"""
"""Counts the page faults of making and freeing 64 MiB twenty times, in a process whose heap no other test has shaped."""


def test_freed_memory_is_faulted_in_no_more_in_a_block_and_is_handed_back_after_it() -> None:
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    seen = json.loads(said)
    assert seen["inside"] < seen["outside"] / 20
    assert seen["behind an inner block"] < seen["outside"] / 20
    assert seen["handed back"] > 2**25
