"""Speed is timed in turns, prefill and decode apart, and stands beside the compute that was removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from components.evaluate import speed as module
from components.evaluate.speed import measure_speed, peak_memory, prefill_flops, promised_speedup, time_generation
from components.lib.recipe.schema import Speed
from tests.components.lib.transformer.zoo import SPECIMENS, VOCABULARY, Specimen

TOKENS = torch.arange(3, 50)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return SPECIMENS[0].model(layers=4)


def settings(**fields: Any) -> Speed:
    return Speed.model_validate({"batches": (1, 2), "prompt": 8, "generate": 3, "repeats": 2} | fields)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, tuple[int, ...]]]:
    """Replace the clock: every pass takes 2 s of prefill and steps of 0.1, 0.2, … s. Yields the passes as they are run."""
    passes: list[tuple[object, tuple[int, ...]]] = []

    def timed(model: object, prompts: torch.Tensor, generate: int) -> Sequence[float]:
        passes.append((model, tuple(prompts.shape)))
        return [2.0, *(0.1 * step for step in range(1, generate + 1))]

    monkeypatch.setattr(module, "time_generation", timed)
    return passes


def test_throughput_comes_from_the_median_of_passes_and_of_steps(model: PreTrainedModel, scripted: list) -> None:
    found = measure_speed({"dense": model}, settings(), TOKENS)["dense"]
    assert found["prefill"]["2"] == {
        "tokens_per_second": 2 * 8 / 2.0,
        "latency_ms_p50": 2000,
        "latency_ms_p90": 2000,
        "turns": [8, 8],
    }
    assert found["decode"]["2"] == {
        "tokens_per_second": 2 / 0.2,
        "latency_ms_p50": pytest.approx(200),
        "latency_ms_p90": pytest.approx(300),
        "turns": [10, 10],
    }
    assert list(found["prefill"]) == ["1", "2"]


def test_without_tokens_to_decode_prefill_alone_is_timed(model: PreTrainedModel) -> None:
    assert list(measure_speed({"dense": model}, settings(generate=0), TOKENS)["dense"]) == ["prefill"]


def test_models_take_turns_inside_each_repetition_after_a_warm_up(model: PreTrainedModel, scripted: list) -> None:
    other = SPECIMENS[0].model(layers=2)
    told: list[int] = []
    measure_speed({"dense": model, "candidate": other}, settings(batches=(2,)), TOKENS, done=told.append)
    assert [timed for timed, _ in scripted] == [model, other] * (1 + 2)
    assert told == [2 * (8 + 3)] * 6


def test_the_warm_up_is_not_counted(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([100.0, 1.0, 1.0])
    monkeypatch.setattr(module, "time_generation", lambda *_: [next(seconds), 0.1])
    found = measure_speed({"dense": model}, settings(batches=(1,)), TOKENS)
    assert found["dense"]["prefill"]["1"]["latency_ms_p90"] == pytest.approx(1000)


def test_a_batch_that_runs_out_of_memory_has_no_figures_but_a_reason(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SPECIMENS[0].model(layers=2)

    def timed(timed_model: PreTrainedModel, prompts: torch.Tensor, generate: int) -> Sequence[float]:
        if timed_model is model and len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [1.0] * (1 + generate)

    monkeypatch.setattr(module, "time_generation", timed)
    found = measure_speed({"dense": model, "candidate": small}, settings(), TOKENS)
    nothing = {"tokens_per_second": None, "latency_ms_p50": None, "latency_ms_p90": None}
    for phase in ("prefill", "decode"):
        assert found["dense"][phase]["2"] == nothing | {"reason": "a batch of 2 ran out of memory"}
        assert found["dense"][phase]["1"]["tokens_per_second"] is not None
        assert found["candidate"][phase]["2"]["tokens_per_second"] is not None


def test_another_error_is_not_taken_for_a_lack_of_memory(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Sequence[float]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(module, "time_generation", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        measure_speed({"dense": model}, settings(), TOKENS)


def test_a_pass_is_a_prefill_of_one_logit_and_greedy_steps_with_the_cache(model: PreTrainedModel) -> None:
    prompts = TOKENS[:16].view(2, 8)
    read: list[torch.Tensor] = []
    logits: list[tuple[int, ...]] = []

    def watch(_: object, __: object, kwargs: dict[str, Any], output: Any) -> None:
        read.append(kwargs["input_ids"])
        logits.append(tuple(output.logits.shape))

    hook = model.register_forward_hook(watch, with_kwargs=True)
    seconds = time_generation(model, prompts, generate=4)
    hook.remove()
    assert len(seconds) == 5
    assert min(seconds) > 0
    assert logits == [(2, 1, VOCABULARY)] * 5
    uncached = prompts
    for step in read[1:]:
        with torch.no_grad():
            assert torch.equal(step, model(input_ids=uncached).logits[:, -1:].argmax(-1))
        uncached = torch.cat([uncached, step], dim=1)


def test_a_vocabulary_without_some_of_the_texts_tokens_can_be_timed(model: PreTrainedModel) -> None:
    found = measure_speed({"champion": model}, settings(repeats=1), torch.tensor([5, VOCABULARY + 1000]))
    assert found["champion"]["decode"]["2"]["tokens_per_second"] is not None


ALIKE = [specimen for specimen in SPECIMENS if specimen.model_type != "qwen3_moe"]  # its layers are of two kinds


@pytest.mark.parametrize("specimen", ALIKE, ids=lambda specimen: specimen.name)
def test_every_layer_counts_the_same_in_every_family(specimen: Specimen) -> None:
    six, four, two = (prefill_flops(specimen.model(layers), prompt=16) for layers in (6, 4, 2))
    assert six - four == four - two > 0


def test_operations_of_a_llama_by_hand(model: PreTrainedModel) -> None:
    length, hidden, inner, keys = 16, 32, 48, 16  # 4 heads of 8, 2 of them for keys and values
    projections = 2 * length * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    attention = 2 * 2 * length * length * hidden
    assert prefill_flops(model, length) == 4 * (projections + attention) + 2 * hidden * VOCABULARY


def test_the_promise_is_the_ratio_of_the_operations(model: PreTrainedModel) -> None:
    half = SPECIMENS[0].model(layers=2)
    promised = promised_speedup(model, half, prompt=16)
    assert promised == prefill_flops(model, 16) / prefill_flops(half, 16)
    assert 1.9 < promised < 2  # the head's row stays


def test_peak_memory_is_weights_cache_and_activations_and_the_same_every_time(model: PreTrainedModel) -> None:
    ids = torch.full((4, 16), 5)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    cache = 4 * 2 * 4 * 16 * 2 * 8 * 4  # layers, keys and values, batch, prompt, heads, width, bytes
    peak = peak_memory(model, ids)
    assert peak is not None
    assert peak > weights + cache
    assert peak_memory(model, ids) == peak
    # A model with half the layers has half of their weights and cache.
    half = SPECIMENS[0].model(layers=2)
    smaller = peak_memory(half, ids)
    layers = sum(parameter.nbytes for layer in half.model.layers for parameter in layer.parameters())
    assert smaller is not None
    assert peak - smaller == layers + cache // 2


def test_a_batch_that_does_not_fit_in_memory_has_no_peak(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(model, "forward", full)
    assert peak_memory(model, torch.full((4, 16), 5)) is None
