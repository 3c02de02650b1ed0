"""Channels gated by hooks: what a gate of 1, of 0 and between them computes, and that the model stays as it was.

That a gate of 0 is the cut, of every family and along every axis, is the contract's (test_channel_contract.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.lib.transformer.channels import layout_of
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.gates import final_state, gated, skipped
from components.lib.transformer.layout import Axis, axis_of
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import NO_CHANNELS, Channels
from tests.components.lib.transformer.zoo import (
    NARROWABLE,
    Specimen,
    draw_channels,
    logits,
    prompts,
    scale_slices,
)

BY_NAME = {specimen.name: specimen for specimen in NARROWABLE}
LAYERS = 3
HALF = 0.5
"""The part of an axis that `draw_channels` leaves."""

READ_BY_PROJECTIONS: list[tuple[Specimen, Axis]] = [
    *((specimen, "ffn") for specimen in NARROWABLE),
    *(
        (specimen, "heads")
        for specimen in NARROWABLE
        # OLMo 2 normalises over all heads; families that state no width of a head lose hidden channels with them.
        if specimen.name != "olmo2" and layout_of(FAMILIES[specimen.model_type]).head
    ),
]
"""Each specimen with the axes that it reads by projections alone."""


@pytest.fixture
def model() -> PreTrainedModel:
    return BY_NAME["llama-biased"].model(LAYERS)


def zeroed(model: PreTrainedModel, channels: Channels) -> PreTrainedModel:
    """Return a copy whose weights are 0 wherever the cut takes them away."""
    model = copy.deepcopy(model)
    scale_slices(model, channels, 0)
    return model


def of_one_layer(model: PreTrainedModel, axis: Axis, layer: int, channel: int) -> Channels:
    """The same number of channels in every layer, but in `layer` the given one."""
    return Channels.model_validate({axis: tuple((channel if at == layer else 0,) for at in range(LAYERS))})


def norms(model: PreTrainedModel, axis: Axis) -> list[nn.Module]:
    """The norms over an axis."""
    layout = layout_of(FAMILIES[model.config.model_type])
    found = [(layout.segments(name), module) for name, module in model.named_modules()]
    return [module for segments, module in found if segments and len(segments) == 1 and axis_of(segments[0][0]) == axis]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of summation."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("specimen", NARROWABLE, ids=str)
def test_a_gate_of_one_leaves_the_logits_bit_for_bit(specimen: Specimen) -> None:
    model = specimen.model(LAYERS)
    expected = logits(model)
    with narrowed(model, draw_channels(model), gate=1.0):
        assert torch.equal(logits(model), expected)
    with narrowed(model, NO_CHANNELS, gate=0.0):
        assert torch.equal(logits(model), expected)


class TestAGateOfZero:
    @pytest.mark.parametrize(("specimen", "axis"), READ_BY_PROJECTIONS, ids=str)
    def test_is_the_slices_of_the_weights_at_zero(self, specimen: Specimen, axis: Axis) -> None:
        model = specimen.model(LAYERS)
        channels = draw_channels(model, (axis,))
        expected = logits(zeroed(model, channels))
        with narrowed(model, channels):
            assert_close(logits(model), expected)

    @pytest.mark.parametrize(
        ("name", "axis"),
        [("llama", "hidden"), ("mistral", "hidden"), ("granite", "hidden"), ("olmo2", "hidden"), ("olmo2", "heads")],
    )
    def test_is_the_slices_at_zero_where_rmsnorm_counts_what_stays(self, name: str, axis: Axis) -> None:
        """√(Σx²/k + ε) = √(d/k) · √(Σx²/d + εk/d): of d channels k stay, and the others are 0."""
        model = BY_NAME[name].model(LAYERS)
        channels = draw_channels(model, (axis,))
        expected = zeroed(model, channels)
        only_zeroed = logits(expected)
        for norm in norms(expected, axis):
            norm.weight.data *= HALF**0.5
            norm.variance_epsilon *= HALF  # type: ignore[operator, assignment]
        with narrowed(model, channels):
            assert_close(logits(model), logits(expected))
            assert (logits(model) - only_zeroed).abs().max() > 0.1

    def test_of_gemma_s_hidden_scales_the_embedding_by_the_width_that_stays(self) -> None:
        """Its norms multiply by 1 + w."""
        model = BY_NAME["gemma2"].model(LAYERS)
        channels = draw_channels(model, ("hidden",))
        expected = zeroed(model, channels)
        expected.get_input_embeddings().embed_scale *= HALF**0.5  # type: ignore[operator]
        for norm in norms(expected, "hidden"):
            norm.weight.data = (1 + norm.weight.data) * HALF**0.5 - 1
            norm.eps *= HALF  # type: ignore[operator, assignment]
        with narrowed(model, channels):
            assert_close(logits(model), logits(expected))

    @pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "starcoder2"])
    def test_of_hidden_is_the_slices_at_zero_where_layernorm_counts_what_stays(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = BY_NAME[name].model(LAYERS)
        channels = draw_channels(model, ("hidden",))
        expected = zeroed(model, channels)
        stays = torch.ones(model.config.hidden_size).index_fill(0, torch.tensor(channels.hidden), 0)

        def counting(norm: nn.LayerNorm, x: Tensor) -> Tensor:
            """What is to go is 0 in x, in the weight and in the bias."""
            centred = (x - x.sum(-1, keepdim=True) / stays.sum()) * stays
            variance = centred.square().sum(-1, keepdim=True) / stays.sum()
            return centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias

        with narrowed(model, channels):
            found = logits(model)
        monkeypatch.setattr(nn.LayerNorm, "forward", counting)
        assert_close(found, logits(expected))

    @pytest.mark.parametrize("axis", ["ffn", "heads"])
    def test_is_of_the_channels_of_each_layer(self, model: PreTrainedModel, axis: Axis) -> None:
        """Another channel in one layer is another model."""
        said = []
        for layer in range(LAYERS):
            channels = of_one_layer(model, axis, layer, channel=1)
            expected = logits(zeroed(model, channels))
            with narrowed(model, channels):
                said.append(logits(model))
            assert_close(said[-1], expected)
        assert (said[0] - said[1]).abs().max() > 0.1

    def test_hands_the_head_nothing_of_the_channels_that_go(self, model: PreTrainedModel) -> None:
        """So that the final states of the model and of the cut one can be compared."""
        channels = draw_channels(model, ("hidden",))
        with narrowed(model, channels), final_state(model) as state:
            logits(model)
            assert state.value is not None
            assert state.value[..., list(channels.hidden)].eq(0).all()


class TestAGateBetween:
    @pytest.mark.parametrize("axis", ["hidden", "ffn", "heads"])
    def test_leads_from_one_end_to_the_other(self, model: PreTrainedModel, axis: Axis) -> None:
        channels = draw_channels(model, (axis,))
        whole = logits(model)
        said = []
        for gate in (0.0, 1e-4, 0.5, 1 - 1e-4):
            with narrowed(model, channels, gate):
                said.append(logits(model))
        assert not torch.equal(said[1], said[0])
        torch.testing.assert_close(said[1], said[0], rtol=1e-2, atol=1e-2)
        assert not torch.equal(said[3], whole)
        torch.testing.assert_close(said[3], whole, rtol=1e-2, atol=1e-2)
        assert (said[2] - whole).abs().max() > 0.1 < (said[2] - said[0]).abs().max()

    def test_of_ffn_is_the_weights_that_read_them_times_the_gate(self, model: PreTrainedModel) -> None:
        channels = draw_channels(model, ("ffn",))
        expected = copy.deepcopy(model)
        for layer, gone in enumerate(channels.ffn):
            expected.model.layers[layer].mlp.down_proj.weight.data[:, list(gone)] *= 0.3
        with narrowed(model, channels, gate=0.3):
            assert_close(logits(model), logits(expected))

    def test_of_hidden_is_a_mean_of_the_norm_and_the_narrow_norm(self, model: PreTrainedModel) -> None:
        """Of RMSNorm: g · x/‖x‖ and, in the channels that stay, (1 − g) · x/‖x that stays‖, each of its own number."""
        gone = (0, 3, 4, 17, 20, 21, 30, 31)
        stays = [channel for channel in range(32) if channel not in gone]
        norm = model.model.norm
        x = torch.randn(2, 5, 32)
        expected = 0.3 * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        narrow = x[..., stays]
        expected[..., stays] += 0.7 * narrow * (narrow.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        with narrowed(model, Channels(hidden=gone), gate=0.3):
            torch.testing.assert_close(norm(x), expected * norm.weight)

    @pytest.mark.parametrize("gate", [0.0, 0.4])
    def test_lets_gradients_flow_to_every_weight_that_still_counts(self, model: PreTrainedModel, gate: float) -> None:
        channels = draw_channels(model)
        tokens, mask = prompts()
        with narrowed(model, channels, gate):
            model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
        for layer, gone in enumerate(channels.ffn):
            read = model.model.layers[layer].mlp.down_proj.weight.grad.ne(0).any(0)
            assert read[list(gone)].all() if gate else not read[list(gone)].any()
            assert read.sum() >= 48 - len(gone)
        norm = model.model.norm.weight.grad.ne(0)
        assert norm[list(channels.hidden)].any() == bool(gate)
        assert norm.sum() >= 32 - len(channels.hidden)


def test_it_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    dense, channels = logits(model), draw_channels(model)

    def interrupted() -> None:
        with narrowed(model, channels, gate=0.5):
            logits(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(logits(model), dense)
    assert not [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]
    assert all(isinstance(weight, nn.Parameter) for weight in model.model.norm._parameters.values())


def test_it_nests_with_skipped_and_gated_layers(model: PreTrainedModel) -> None:
    channels = draw_channels(model)
    with narrowed(model, channels), skipped(model, [1]):
        expected = logits(model)
    with skipped(model, [1]), narrowed(model, channels):
        assert torch.equal(logits(model), expected)
    with narrowed(model, channels), gated(model, torch.tensor([1.0, 0.0, 1.0])):
        assert torch.equal(logits(model), expected)
    with narrowed(model, channels):
        assert not torch.equal(logits(model), expected)


def test_axes_opened_one_after_the_other_are_gated_together(model: PreTrainedModel) -> None:
    channels = draw_channels(model)
    with narrowed(model, channels):
        expected = logits(model)
    with (
        narrowed(model, Channels(hidden=channels.hidden)),
        narrowed(model, Channels(ffn=channels.ffn)),
        narrowed(model, Channels(heads=channels.heads)),
    ):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
def test_a_model_with_adapters_is_narrowed_like_any_other(name: str) -> None:
    """Adapters read what the weights beside them read."""
    model = BY_NAME[name].model(LAYERS)
    channels = draw_channels(model)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    with narrowed(adapted, channels):
        found = logits(adapted)  # type: ignore[arg-type]
    merged = adapted.merge_and_unload()
    with narrowed(merged, channels):
        torch.testing.assert_close(found, logits(merged), rtol=1e-3, atol=1e-3)
    with narrowed(model, channels):
        assert (found - logits(model)).abs().max() > 0.1


def test_activation_checkpointing_changes_no_gradient(model: PreTrainedModel) -> None:
    channels = draw_channels(model)
    tokens, mask = prompts()

    def gradient() -> Tensor:
        model.zero_grad()
        with narrowed(model, channels, gate=0.5):
            model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
        return model.model.layers[0].mlp.down_proj.weight.grad.clone()

    model.train()
    expected = gradient()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradient(), expected)
