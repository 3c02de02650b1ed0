"""Speed of prefill and decode, and the speed-up that the removed floating-point operations promise.

The models take turns inside each repetition, because only ratios between models count: a slow second of the machine then
slows all models alike. Prefill is one forward pass over (batch, prompt) that computes the logits of the last position only,
as generation does; decode is greedy steps with the key-value cache after it. Weights keep their type.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from components.lib.recipe.schema import Speed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Figures = dict[str, Any]
"""`tokens_per_second`, `latency_ms_p50`, `latency_ms_p90`, and `turns`, the tokens per second of each repetition; the first
three None, with a `reason`, if the batch was not measured."""

SpeedOf = dict[str, dict[str, Figures]]
"""Phase (`prefill`, `decode`, and `throughput` behind a server) → batch size as a string → figures."""


@dataclass
class _Timings:
    """Seconds of one model at one batch size."""

    prefill: list[float] = field(default_factory=list)
    """One for each repetition."""
    decode: list[list[float]] = field(default_factory=list)
    """One for each decoded token, by repetition."""
    failure: str | None = None


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    speed: Speed,
    tokens: Tensor,
    done: Callable[[int], None] | None = None,
) -> dict[str, SpeedOf]:
    """Measure the speed of the models side by side.

    The prefill latency is that of a whole pass, the decode latency that of one step (a token of every sequence);
    throughput is the median of the repetitions. The figures of a batch that does not fit in memory are None, with a reason.
    Without tokens to decode, prefill alone is measured.

    Args:
        models: in evaluation mode, all on one device.
        speed: batch sizes, prompt, tokens to generate, repetitions; each batch size has one more repetition as warm-up.
        tokens: (any number,), the prompts are filled with them, repeated as needed.
        done: called after each pass with the number of its tokens, prompt and generated.
    """
    phases = ("prefill", "decode") if speed.generate else ("prefill",)
    results: dict[str, SpeedOf] = {name: {phase: {} for phase in phases} for name in models}
    for batch in speed.batches:
        ids = prompt_batch(tokens, batch, speed.prompt)
        timings = {name: _Timings() for name in models}
        for repetition in range(speed.repeats + 1):
            for name, model in models.items():
                _time(model, ids, speed.generate, timings[name], warm_up=repetition == 0)
                if done:
                    done(batch * (speed.prompt + speed.generate))
        for name, timing in timings.items():
            read = [batch * speed.prompt / seconds for seconds in timing.prefill]
            results[name]["prefill"][str(batch)] = figures([timing.prefill], read, timing.failure)
            if speed.generate:
                steps = [batch / statistics.median(seconds) for seconds in timing.decode]
                results[name]["decode"][str(batch)] = figures(timing.decode, steps, timing.failure)
    return results


def prompt_batch(tokens: Tensor, batch: int, prompt: int) -> Tensor:
    """Fill (batch, prompt) with the tokens, and begin again at the start when they end."""
    return tokens.repeat(-(-batch * prompt // len(tokens)))[: batch * prompt].view(batch, prompt)


def _time(model: PreTrainedModel, prompts: Tensor, generate: int, timings: _Timings, warm_up: bool) -> None:
    """Add one repetition to the timings; skip it after a repetition that ran out of memory, and do not record the warm-up."""
    if timings.failure:
        return
    try:
        # A champion of another vocabulary may lack some ids; its speed does not depend on which tokens it reads.
        ids = prompts.to(model.device) % model.config.get_text_config().vocab_size
        prefill, *decode = time_generation(model, ids, generate)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        timings.failure = f"a batch of {len(prompts)} ran out of memory"
    else:
        if not warm_up:
            timings.prefill.append(prefill)
            timings.decode.append(decode)
        return
    # Free after the handler: inside it the exception still holds the frames with the activations.
    free_memory()


def free_memory() -> None:
    """Give memory of models and activations that are no longer referenced back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def time_generation(model: PreTrainedModel, prompts: Tensor, generate: int) -> list[float]:
    """Return the seconds of the prefill, then those of each greedy step: 1 + `generate` numbers.

    Args:
        model: in evaluation mode.
        prompts: (batch, prompt) token ids on the model's device.
        generate: decoding steps.
    """
    clock = _CudaClock() if model.device.type == "cuda" else _Clock()
    output = model(input_ids=prompts, use_cache=True, **_last_logits_only(model))
    clock.mark()
    for _ in range(generate):
        token = output.logits[:, -1:].argmax(-1)  # (batch, 1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        clock.mark()
    return clock.seconds()


def _last_logits_only(model: PreTrainedModel) -> dict[str, Any]:
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if takes else {}


class _Clock:
    """Measure seconds between marks, for work that is finished when its call returns."""

    def __init__(self) -> None:
        self._marks = [time.perf_counter()]

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


class _CudaClock:
    """Measure seconds between marks in the GPU's own queue: as in real decoding, no step waits for the GPU."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._marks: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in zip(self._marks, self._marks[1:], strict=False)]


def figures(seconds: Sequence[Sequence[float]], throughput: Sequence[float], failure: str | None = None) -> Figures:
    """Return the figures of one phase at one batch size.

    Args:
        seconds: latencies, in groups of any size.
        throughput: tokens per second of each repetition.
        failure: why the batch was not measured.
    """
    if failure:
        return {"tokens_per_second": None, "latency_ms_p50": None, "latency_ms_p90": None, "reason": failure}
    each = torch.tensor([one for group in seconds for one in group], dtype=torch.float64)
    p50, p90 = each.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
    return {
        "tokens_per_second": statistics.median(throughput),
        "latency_ms_p50": 1000 * p50,
        "latency_ms_p90": 1000 * p90,
        "turns": list(throughput),
    }


@torch.inference_mode()
def prefill_flops(model: PreTrainedModel, prompt: int) -> int:
    """Count the floating-point operations of the prefill of one sequence of `prompt` tokens.

    Matrix products and attention are counted: two operations for each multiply-add, attention over the full square. The
    embedding is a look-up and counts 0; the head counts for the last position only.
    """
    ids = torch.zeros(1, prompt, dtype=torch.long, device=model.device)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        model(input_ids=ids, use_cache=True, **_last_logits_only(model))
    return counter.get_total_flops()


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# The counter knows the fused attention kernels of CUDA and counts 0 for the kernel of the CPU.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@torch.inference_mode()
def peak_memory(model: PreTrainedModel, prompts: Tensor) -> int | None:
    """Count the bytes of all live tensors at the worst moment of a prefill: weights, cache and activations.

    Counted from the tensors, not from the process: the number is the same on every run, and that of the other models in the
    process is not in it. None if the batch does not fit in memory, or the model runs one module several times in a pass.

    Args:
        model: in evaluation mode.
        prompts: (batch, prompt) token ids.
    """
    tracker = MemTracker()
    tracker.track_external(model)
    try:
        with tracker:
            model(
                input_ids=prompts.to(model.device) % model.config.get_text_config().vocab_size,
                use_cache=True,
                **_last_logits_only(model),
            )
    except NotImplementedError:
        return None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        return None
    return int(tracker.get_tracker_snapshot("peak")[model.device]["Total"])


def promised_speedup(dense: PreTrainedModel, candidate: PreTrainedModel, prompt: int) -> float:
    """Return the prefill speed-up that the counts promise: the dense model's operations over the candidate's."""
    return prefill_flops(dense, prompt) / prefill_flops(candidate, prompt)
