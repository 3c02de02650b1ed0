"""Tokens per second of a training step, and the part of the machine's matrix peak that the step reaches.

    python -m benchmarks.training --model FOLDER [--length 256] [--steps 4] [--set regularize.batch_size=8]

The step is that of `regularize` with its objective, a middle layer annealed and the teacher's forward pass included, on random tokens. Its
operations are those of all matrix products that it really makes, counted by torch's FlopCounterMode; a causal attention counts as a whole one,
as is usual. The peak is the best of several plain products of two square matrices in the same process, in fp32 and in bf16. So the part holds
everything that is no matrix product against the step: norms, the softmax, the optimizer, the gates, and the products that are too small.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.training import Regularize
from components.lib.training import regularize as training
from components.lib.training.journal import Silent
from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.device import best_device, computes_in_bf16
from components.lib.transformer.gates import blocks, text_config
from components.lib.transformer.selection import Selection

SIDE = 2048
"""Rows of the square matrices of the peak."""


@dataclass(frozen=True)
class Throughput:
    """The figures of a step."""

    tokens: float
    """Tokens a second."""
    operations: float
    """Floating-point operations of the step's matrix products."""
    seconds: float
    """Of the step: the median."""

    def part_of(self, peak: float) -> float:
        """Return the part of a peak (operations a second) that the step reaches."""
        return self.operations / self.seconds / peak


class _Clock(Silent):
    """Keeps the time at the end of each step; the loop reads the loss there, so that the device has finished."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Keep the time."""
        self.times.append(time.perf_counter())


def measure(model: PreTrainedModel, teacher: PreTrainedModel | None, length: int, settings: Regularize) -> Throughput:
    """Train the model in place, first one step to count its operations, then `settings.steps` and one more to time them.

    Args:
        model: the model.
        teacher: the dense model, if the objective needs one.
        length: tokens of a window.
        settings: the training; its steps are those that are timed.
    """
    layer = len(blocks(model)) // 2
    windows = torch.randint(text_config(model).vocab_size, (settings.batch_size, length))

    def train(steps: int, clock: _Clock) -> None:
        # The gate stays between 1 and 0, so that the layer is computed in each step.
        asked = settings.model_copy(update={"steps": steps, "anneal": 0.99, "checkpoint_every": steps})
        training.regularize(model, teacher, windows, Selection.of_layers("benchmark", [layer]), asked, journal=clock)

    with FlopCounterMode(display=False, custom_mapping=_attention_on_cpu()) as counter:
        train(1, _Clock())
    clock = _Clock()
    train(settings.steps + 1, clock)
    # The first step makes the optimizer's state.
    seconds = statistics.median(end - start for start, end in zip(clock.times[1:], clock.times[2:], strict=False))
    return Throughput(windows.numel() / seconds, float(counter.get_total_flops()), seconds)


def _attention_on_cpu() -> dict[Any, Any]:
    """Return the operations of the processor's attention, which torch's counter does not know: two products, and five in its backward pass."""

    def product(query: torch.Size, key: torch.Size) -> int:
        return 2 * math.prod(query) * key[-2]

    def forward(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * product(query, key)

    def backward(gradient: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
        return 5 * product(query, key)

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def peak(dtype: torch.dtype, side: int = SIDE, seconds: float = 2.0) -> float:
    """Return the operations a second of the fastest product of two square matrices among those of a few seconds."""
    device = best_device()
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    fastest, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        one @ other
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


def main() -> None:
    """Print a table of one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed")
    parser.add_argument("--side", type=int, default=SIDE, help="rows of the matrices of the peak")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the recipe")
    arguments = parser.parse_args()
    base = "{methods: {last: {ratio: 0.25}}, calibration: {data: unused.txt}, evaluate: {perplexity: {unused: unused.txt}}}"
    settings = parse_recipe(base, [*arguments.set, f"regularize.steps={arguments.steps}"]).regularize
    peaks = {dtype: peak(dtype, arguments.side) for dtype in (torch.float32, torch.bfloat16)}
    teacher = load_model(arguments.model, device=best_device()) if training.needs_teacher(settings) else None
    found = measure(load_model(arguments.model, device=best_device()), teacher, arguments.length, settings)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and computes_in_bf16(best_device()))
    print(
        f"{torch.get_num_threads()} threads, {best_device().type}; the step computes in {'bf16' if bf16 else 'fp32'}\n"
        "\n| tokens a second | seconds a step | TFLOP a step | TFLOP/s | of the fp32 peak | of the bf16 peak |\n|---|---|---|---|---|---|\n"
        f"| {found.tokens:.0f} | {found.seconds:.2f} | {found.operations / 1e12:.3g} | {found.operations / found.seconds / 1e12:.3g} | "
        + " | ".join(f"{found.part_of(top):.2f} of {top / 1e12:.3g} TFLOP/s" for top in peaks.values())
        + " |"
    )


if __name__ == "__main__":
    main()
