"""Memory that tensors free is reused within a block, and handed back after it; weights are held in a type that the processor computes in."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from components.lib.transformer import device
from components.lib.transformer.device import computable, raise_weights

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")

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


@glibc
def test_freed_memory_is_faulted_in_no_more_in_a_block_and_is_handed_back_after_it() -> None:
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    seen = json.loads(said)
    assert seen["inside"] < seen["outside"] / 20
    assert seen["behind an inner block"] < seen["outside"] / 20
    assert seen["handed back"] > 2**25


class TestATypeThatTheProcessorEmulates:
    """Products of emulated bf16 take ten times as long as those of fp32 and more."""

    @pytest.fixture(params=[True, False], ids=["computes in bf16", "emulates bf16"])
    def native(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
        monkeypatch.setattr(device, "computes_in_bf16", lambda device: request.param)
        return bool(request.param)

    def test_is_raised_to_fp32_and_the_same_numbers_come_back(self, native: bool) -> None:
        model = nn.Linear(3, 3).bfloat16()
        before = model.weight.detach().clone()
        with computable(model):
            assert model.weight.dtype == (torch.bfloat16 if native else torch.float32)
        assert torch.equal(model.weight, before)
        assert model.weight.dtype == torch.bfloat16

    def test_is_raised_for_good_in_a_model_that_is_not_kept(self, native: bool) -> None:
        model = nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3))
        assert len(raise_weights(model)) == (0 if native else 2)
        assert model[1].weight.dtype == torch.float32

    def test_is_fp16_on_every_processor(self, native: bool) -> None:
        model = nn.Linear(3, 3).half()
        with computable(model):
            assert model(torch.ones(1, 3)).dtype == torch.float32

    def test_of_no_model_does_nothing(self) -> None:
        with computable(None):
            pass
