"""Recovery: adapters on the cut model, stopped early, the best ones merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from components.lib.errors import Refusal
from components.lib.recipe.training import Lora, Recover
from components.lib.training.recover import recover, split
from components.lib.transformer.perplexity import perplexity
from tests.components.lib.training.tiny import Kept, Killed, Written, counting, llama, same, weights
from tests.components.lib.transformer.zoo import MODERN


def settings(**fields: Any) -> Recover:
    defaults = {"steps": 30, "batch_size": 8, "learning_rate": 2e-2, "precision": "fp32", "lora": Lora(rank=4)}
    return Recover(**defaults | {"validation": 0.25, "evaluate_every": 5} | fields)


def test_held_out_windows_are_drawn_from_the_seed_and_trained_on_by_none() -> None:
    windows = torch.arange(20)[:, None]
    training, held_out = split(windows, settings())
    assert sorted([*training.flatten().tolist(), *held_out.flatten().tolist()]) == list(range(20))
    assert len(held_out) == 5
    assert split(windows, settings(seed=1))[1].tolist() != held_out.tolist()


@pytest.mark.parametrize("windows", [1, 2])
def test_too_few_windows_to_hold_some_out_are_refused(windows: int) -> None:
    with pytest.raises(Refusal, match=r"recover.validation 0.1 of . windows holds out 0: raise calibration.samples"):
        split(counting()[:windows], settings(validation=0.1))


def test_it_recovers_and_gives_a_plain_model_back() -> None:
    model = llama()
    before = perplexity(model, counting())
    names = weights(model).keys()
    recovered = recover(model, counting(), settings())
    assert perplexity(recovered, counting()) < 0.5 * before
    assert weights(recovered).keys() == names


@pytest.mark.parametrize("name", ["phimoe", "llama4"])
def test_a_mixture_recovers_whose_router_is_a_linear_layer(name: str) -> None:
    """It returns a tuple, which no adapter can be added to: the other layers are adapted."""
    specimen = next(specimen for specimen in MODERN if specimen.name == name)
    model, windows = specimen.model(2), counting()[:8]
    before = {part: weight.clone() for part, weight in model.state_dict().items()}
    recovered = recover(model, windows, settings(steps=2, evaluate_every=1, batch_size=2, learning_rate=1e-3))
    changed = {part for part, weight in recovered.state_dict().items() if not torch.equal(weight, before[part])}
    assert any(part.endswith("q_proj.weight") for part in changed)
    assert before.keys() == recovered.state_dict().keys()
    assert not any("router" in part for part in changed)


def contrary() -> torch.Tensor:
    """Windows of which the held-out ones count downwards: what is learnt on the others is wrong there."""
    windows = counting()
    held_out = split(torch.arange(len(windows)), settings())[1]
    windows[held_out] = windows[held_out].flip(-1)
    return windows


def test_the_adapters_that_measured_best_are_the_ones_merged() -> None:
    journal = Written()
    model = recover(llama(), contrary(), settings(patience=100), journal=journal)
    looks = journal.curve("validation")
    assert len(looks) == 7
    assert min(looks) < 0.9 * looks[-1]
    assert perplexity(model, split(contrary(), settings())[1]) == pytest.approx(min(looks), rel=1e-3)


def test_it_stops_when_patience_runs_out() -> None:
    journal = Written()
    recover(llama(), contrary(), settings(patience=2), journal=journal)
    looks = journal.curve("validation")
    assert looks.index(min(looks)) == len(looks) - 1 - 2
    assert journal.done[-1][0] == 5 * (len(looks) - 1) < 30


@pytest.mark.parametrize("killed_at", [7, 13])
def test_killed_and_taken_up_it_ends_with_the_very_weights(tmp_path: Path, killed_at: int) -> None:
    asked = settings(steps=15, evaluate_every=2, checkpoint_every=3, patience=99)
    start = llama()
    first = Written()
    uninterrupted = recover(copy.deepcopy(start), contrary(), asked, journal=first)
    checkpoints = Kept(tmp_path / "kept")
    assert first.done[-1][0] > killed_at  # else this test tells nothing
    with pytest.raises(Killed):
        recover(copy.deepcopy(start), contrary(), asked, checkpoints=checkpoints, journal=Written(killed_at=killed_at))
    resumed = recover(copy.deepcopy(start), contrary(), asked, checkpoints=checkpoints)
    assert same(weights(resumed), weights(uninterrupted))


def test_a_bf16_model_comes_back_in_bf16() -> None:
    model: LlamaForCausalLM = recover(llama(dtype=torch.bfloat16), counting(), settings(steps=5, precision="auto"))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
