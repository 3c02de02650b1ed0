"""Code on fake tensors is counted as the allocator counts it on real ones."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from components.lib.recipe.training import Regularize
from components.lib.training import regularize as training
from components.lib.training.teacher import keep
from components.lib.transformer.device import emulated_types
from components.lib.transformer.selection import Selection
from pipeline.plan.fake import Memory, counted
from pipeline.plan.stages import Shape
from tests.pipeline.plan.shapes import TINY


def work(settings: dict[str, Any], memory: Memory) -> None:
    shape = Shape(TINY, "bfloat16")
    chosen = Regularize.model_validate({"steps": 2, "batch_size": 2, "learning_rate": 1e-5, **settings})
    memory.model = model = shape.model()
    memory.teacher = teacher = shape.model() if training.needs_teacher(chosen) else None
    windows = torch.zeros(2, 32, dtype=torch.int32)
    with tempfile.TemporaryDirectory() as folder:
        kept = keep(model, windows, chosen, Path(folder)) if training.keeps_teacher(chosen) else None
        training.regularize(model, teacher or kept, windows, Selection.of_layers("x", [1]), chosen)


def allocated(settings: dict[str, Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work(settings, Memory())
    found = [one for one in recorded.profiler.kineto_results.events() if one.name() == "[memory]"]  # type: ignore[union-attr]
    live = most = 0
    for event in sorted(found, key=lambda one: one.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True, "micro_batch_size": 1},
        {"trainable": "lora"},
        {"teacher_top": 8},
        {"precision": "bf16", "optimizer": "adamw-8bit"},
    ],
    ids=["all weights", "gradient checkpointing", "adapters", "kept teacher", "8 bits"],
)
def test_the_plan_is_what_the_allocator_gives(settings: dict[str, Any]) -> None:
    with counted("cpu") as memory:
        work(settings, memory)
    assert memory.peak.total == pytest.approx(allocated(settings), rel=0.1)


def test_the_parts_are_told_apart() -> None:
    with counted("cpu") as memory:
        work({"optimizer": "adamw"}, memory)
    weights = Shape(TINY, "float32").bytes
    peak = memory.peak
    assert weights <= peak.weights < 1.1 * weights  # trained in fp32
    assert peak.optimizer == pytest.approx(2 * weights, rel=0.5)  # the removed layer has none
    raised = torch.bfloat16 in emulated_types(torch.device("cpu"))  # it computes in fp32 on such a processor
    assert peak.teacher == pytest.approx(weights if raised else weights / 2, rel=0.1)
    assert peak.logits > 0
    assert sum(peak.parts().values()) == peak.total


def test_a_kept_teacher_is_in_no_memory() -> None:
    with counted("cuda") as beside:
        work({}, beside)
    with counted("cuda") as kept:
        work({"teacher_top": 8}, kept)
    assert kept.peak.teacher == 0
    assert kept.peak.total <= beside.peak.total - beside.peak.teacher


def test_states_elsewhere_are_not_on_the_gpu() -> None:
    with counted("cuda") as beside:
        work({}, beside)
    with counted("cuda") as elsewhere:
        work({"offload_optimizer": True}, elsewhere)
    with counted("cpu") as processor:
        work({"offload_optimizer": True}, processor)
    assert elsewhere.peak.optimizer == 0
    assert elsewhere.of_optimizer() == processor.peak.optimizer == beside.peak.optimizer


def test_an_optimizer_of_8_bits_takes_a_quarter() -> None:
    with counted("cuda") as full:
        work({}, full)
    with counted("cuda") as small:
        work({"optimizer": "adamw-8bit"}, small)
    assert small.of_optimizer() < 0.35 * full.of_optimizer()
