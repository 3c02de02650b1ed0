"""Learning the gates: only they move, their mean stays, what is removed stays removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from components.lib.errors import Refusal
from components.lib.methods.trsp import Trsp
from components.lib.methods.trsp.gates import learn_gates
from tests.components.lib.training.tiny import chosen, counting, llama, same, weights


def settings(**fields: Any) -> Trsp:
    return Trsp(**{"ratio": 0.25, "batch_size": 8, "learning_rate": 0.05} | fields)


def learn(model: LlamaForCausalLM, removed: tuple[int, ...] = (), steps: int = 20, **fields: Any) -> list[torch.Tensor]:
    start = torch.ones(model.config.num_hidden_layers)
    learning = learn_gates(model, counting(), start, removed, settings(**fields), steps=steps)
    return [gates for _, gates in learning]


@pytest.fixture(scope="module")
def idle() -> LlamaForCausalLM:
    """A model whose layer 2 does harm and whose other layers have been trained to count without it."""
    from components.lib.recipe.training import Objective, Regularize
    from components.lib.training.regularize import regularize

    objective = Objective(lm=1, kl=0, state=0)
    asked = Regularize(steps=60, learning_rate=3e-3, precision="fp32", objective=objective, anneal=0.01)
    return regularize(llama(), None, counting(), chosen(2), asked)


def test_the_layer_that_does_no_good_gets_the_smallest_gate(idle: LlamaForCausalLM) -> None:
    gates = learn(idle)[-1]
    assert gates.argmin() == 2
    assert gates[2] < 0.8


def test_the_weights_are_left_as_they_were_and_trainable_again(idle: LlamaForCausalLM) -> None:
    before = weights(idle)
    idle.lm_head.weight.requires_grad_(False)
    learn(idle, steps=3)
    assert same(weights(idle), before)
    assert {name for name, weight in idle.named_parameters() if not weight.requires_grad} == {
        "model.embed_tokens.weight"
    }
    assert all(weight.grad is None for weight in idle.parameters())
    idle.lm_head.weight.requires_grad_(True)


def test_the_mean_of_the_gates_that_are_left_stays_1_and_removed_ones_stay_0(idle: LlamaForCausalLM) -> None:
    for gates in learn(idle, removed=(1,), steps=5, strength=0.5):
        assert gates[1] == 0
        assert gates[[0, 2, 3]].mean() == pytest.approx(1, abs=1e-5)


def test_bf16_weights_have_fp32_gates(idle: LlamaForCausalLM) -> None:
    gates = learn(llama(dtype=torch.bfloat16), steps=2, learning_rate=1e-3, strength=0.0)[-1]
    assert gates.dtype == torch.float32
    assert 0 < (gates - 1).abs().max() < 0.0078  # less than bf16 could move


def test_a_round_goes_on_with_the_windows_after_the_last_one_s(idle: LlamaForCausalLM) -> None:
    start = torch.ones(4)

    def losses(first: int) -> list[float]:
        how = settings(learning_rate=1e-9, strength=0.0)
        return [loss for loss, _ in learn_gates(idle, counting(), start, (), how, steps=2, first=first)]

    assert losses(0)[1] == pytest.approx(losses(1)[0], rel=1e-4)


def test_a_loss_that_is_not_finite_names_the_cure() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(Refusal, match=r"loss is nan at step 1 with methods.trsp.learning_rate 0.05: lower it"):
        learn(model)
