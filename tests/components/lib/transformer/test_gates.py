"""Gates, skips and views leave the model exact, differentiable, and as they found it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.errors import Refusal
from components.lib.transformer.gates import blocks, bypassed, final_state, gated, resumed, skipped, watched
from tests.components.lib.transformer.zoo import SPECIMENS, logits, prompts

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}
LAYERS = 4


@pytest.fixture
def model() -> PreTrainedModel:
    return BY_NAME["llama"].model(LAYERS)


def loss(model: PreTrainedModel) -> Tensor:
    tokens, mask = prompts()
    return model(input_ids=tokens, attention_mask=mask, labels=tokens).loss


def formula(gates: Tensor, placement: str) -> Callable[[int], Callable[..., Tensor]]:
    """The gate's definition, written out for autograd, as a hook of the layer."""

    def hook_of(layer: int) -> Callable[..., Tensor]:
        def hook(block: torch.nn.Module, inputs: tuple[Tensor, ...], f: Tensor) -> Tensor:
            x, g = inputs[0], gates[layer]
            return x + g * (f - x) if placement == "branch" else g * f

        return hook

    return hook_of


@pytest.mark.parametrize("placement", ["branch", "output"])
def test_a_gate_and_its_gradients_are_the_formula_s(model: PreTrainedModel, placement: str) -> None:
    gates = torch.tensor([0.9, 0.2, 1.0, 0.6], requires_grad=True)
    with gated(model, gates, placement):
        ours = loss(model)
    ours.backward()
    found, weight = gates.grad, model.model.embed_tokens.weight.grad.clone()
    gates.grad = None
    model.zero_grad()

    handles = [
        block.register_forward_hook(formula(gates, placement)(layer)) for layer, block in enumerate(blocks(model))
    ]
    expected = loss(model)
    expected.backward()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(found, gates.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_step_too_small_for_bf16_reaches_a_bf16_model() -> None:
    """0.999 is 1 in bf16; the gate is fp32, and so is what it multiplies."""
    model = BY_NAME["llama"].model(LAYERS, dtype=torch.bfloat16)
    gates = torch.full((LAYERS,), 0.999, requires_grad=True)
    with gated(model, gates):
        loss(model).backward()
    assert not torch.equal(logits(model), _gated_logits(model, gates))
    assert gates.grad is not None
    assert gates.grad.dtype == torch.float32
    assert gates.grad.ne(0).all()


def _gated_logits(model: PreTrainedModel, gates: Tensor) -> Tensor:
    with gated(model, gates):
        return logits(model)


def test_gates_are_read_at_each_forward_pass(model: PreTrainedModel) -> None:
    """So that an annealed gate is moved in place, under one context."""
    dense = logits(model)
    with skipped(model, [2]):
        without = logits(model)
    gates = torch.ones(LAYERS)
    with gated(model, gates):
        assert torch.equal(logits(model), dense)
        gates[2] = 0
        assert torch.equal(logits(model), without)


def test_an_output_gate_scales_all_below_it(model: PreTrainedModel) -> None:
    """The paper's placement: a zero in one layer leaves nothing of the layers before it."""
    gates = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with gated(model, gates, "output"), watched(model, [2]) as seen:
        logits(model)
        assert seen[2][1].eq(0).all()


def test_gates_of_another_number_than_the_layers_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="the model has 4 layers"), gated(model, torch.ones(3)):
        pass


def test_every_context_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    dense = logits(model)

    def interrupted() -> None:
        with gated(model, torch.zeros(LAYERS)), skipped(model, [0]), watched(model, [1]), final_state(model):
            logits(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(logits(model), dense)
    assert not [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]


def test_contexts_nest(model: PreTrainedModel) -> None:
    with skipped(model, [0, 3]):
        both = logits(model)
    with skipped(model, [3]), skipped(model, [0]):
        assert torch.equal(logits(model), both)


def test_watched_states_are_the_blocks_own(model: PreTrainedModel) -> None:
    """The output of a block is the input of the next, and gradients flow through what is seen."""
    with watched(model, range(LAYERS)) as seen:
        tokens, mask = prompts()
        hidden = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        for layer, (x, f) in seen.items():
            assert torch.equal(x, hidden[layer])
            if layer + 1 < LAYERS:
                assert f is seen[layer + 1][0]
        (seen[1][1] - seen[1][0]).pow(2).sum().backward()
    assert blocks(model)[1].mlp.down_proj.weight.grad.ne(0).any()
    assert blocks(model)[2].mlp.down_proj.weight.grad is None


def test_watched_sees_what_the_gate_inside_it_hands_on(model: PreTrainedModel) -> None:
    with skipped(model, [1]), watched(model, [1]) as after:
        logits(model)
        assert torch.equal(*after[1])
    with watched(model, [1]) as before, skipped(model, [1]):
        logits(model)
        assert not torch.equal(*before[1])


@pytest.mark.parametrize("name", ["llama", "opt-post-norm", "gpt2", "gpt_neox"])
def test_the_final_state_is_what_the_head_reads(name: str) -> None:
    model = BY_NAME[name].model(LAYERS)
    tokens, _ = prompts()
    with final_state(model) as state:
        assert state.value is None
        said = model(input_ids=tokens).logits
        assert state.value is not None
        assert torch.equal(model.get_output_embeddings()(state.value), said)


def test_activation_checkpointing_changes_no_gradient(model: PreTrainedModel) -> None:
    def gradients() -> tuple[Tensor, Tensor]:
        gates = torch.full((LAYERS,), 0.7, requires_grad=True)
        model.zero_grad()
        with gated(model, gates), watched(model, [1]) as seen:
            value = loss(model)
            (value + (seen[1][1] - seen[1][0]).pow(2).mean()).backward()
        assert gates.grad is not None
        return gates.grad, blocks(model)[0].mlp.down_proj.weight.grad.clone()

    model.train()
    expected = gradients()
    model.activation_checkpointing_enable()
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_model_with_adapters_is_gated_like_any_other(model: PreTrainedModel) -> None:
    with skipped(model, [1]):
        expected = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert len(blocks(adapted)) == LAYERS
    with skipped(adapted, [1]), final_state(adapted) as state:
        assert torch.equal(logits(adapted), expected)
        assert state.value is not None


@pytest.mark.parametrize("named", [False, True])
def test_blocks_may_take_names_and_return_tuples(model: PreTrainedModel, named: bool) -> None:
    """Other releases of transformers do."""
    block = blocks(model)[0]
    block.forward = lambda hidden_states, **rest: (hidden_states + 1, "attentions")
    x = torch.zeros(1, 2, 32)
    with skipped(model, [0]):
        output = block(hidden_states=x) if named else block(x)
    assert output[0] is x
    assert output[1] == "attentions"


def test_an_unknown_model_is_refused(model: PreTrainedModel) -> None:
    model.config.model_type = "reformer"
    with pytest.raises(Refusal, match="'reformer' is not supported"):
        blocks(model)


def test_a_layer_that_is_bypassed_twice_stays_bypassed_until_the_outer_one_ends(model: PreTrainedModel) -> None:
    before = logits(model)
    with bypassed(model, [1]):
        expected = logits(model)
        with bypassed(model, [1, 2]):
            pass
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)


class TestResumed:
    def test_a_pass_computes_what_it_computes_from_the_embedding(self, model: PreTrainedModel) -> None:
        """Whichever rows of the windows it reads, in whichever order."""
        windows, _ = prompts(padding=(0, 0))
        with watched(model, [1]) as seen, torch.no_grad():
            expected = model(input_ids=windows).logits
            stream = seen[1][1]
        with resumed(model, 1, windows, stream), torch.no_grad():
            assert torch.equal(model(input_ids=windows, use_cache=False).logits, expected)
            assert torch.equal(model(input_ids=windows.flip(0)[:1], use_cache=False).logits, expected.flip(0)[:1])

    def test_the_stream_is_the_given_one(self, model: PreTrainedModel) -> None:
        windows, _ = prompts(padding=(0, 0))
        stream = torch.randn(*windows.shape, model.config.hidden_size)
        with resumed(model, 2, windows, stream), watched(model, [3]) as seen, torch.no_grad():
            model(input_ids=windows, use_cache=False)
            assert torch.equal(seen[3][0], stream)

    def test_refuses_a_window_that_it_does_not_know(self, model: PreTrainedModel) -> None:
        windows, _ = prompts(padding=(0, 0))
        stream = torch.zeros(*windows.shape, model.config.hidden_size)
        with resumed(model, 1, windows, stream), pytest.raises(ValueError, match="no stream is known"):
            model(input_ids=windows.roll(1, dims=1), use_cache=False)
