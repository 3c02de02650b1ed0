"""Tiny random models of every family, made on the spot: what the tests of models run on.

A specimen is one shape of a family: its model type and the settings beside the common ones. A new family needs one line here
to be held to the whole contract (test_contract.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from components.lib.transformer.channels import channels_to_remove, kept_rows, layout_of
from components.lib.transformer.checkpoint import WEIGHTS
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.family import HEADS
from components.lib.transformer.gates import blocks
from components.lib.transformer.layout import Axis, Widths
from components.lib.transformer.selection import AXES, Channels

VOCABULARY = 96
LENGTH = 20
"""Tokens of a test prompt: longer than every sliding window here."""


@dataclass(frozen=True)
class Specimen:
    """One shape of a family."""

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    grouped: bool = True
    """Whether the family has fewer key-value heads than heads, where asked."""
    ties: bool = True
    """Whether its tied form is part of the property tests."""

    def __str__(self) -> str:
        return self.name

    def model(
        self,
        layers: int = 6,
        heads: int = 4,
        key_value_heads: int = 2,
        tied: bool | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> PreTrainedModel:
        """Make the model, every parameter random (biases and norms too), so that no layer is like another or like the identity."""
        common: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if self.grouped:
            common["num_key_value_heads"] = key_value_heads
        if tied is not None:
            common["tie_word_embeddings"] = tied
        config = AutoConfig.for_model(self.model_type, **common | self.settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = parameter.data + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise
        model.tie_weights()
        for parameter in model.parameters():  # the parameters alone: rotary frequencies stay fp32
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model.eval()


WINDOW = {"sliding_window": 4}

SPECIMENS = (
    Specimen("llama", "llama"),
    Specimen("llama-biased", "llama", {"attention_bias": True, "mlp_bias": True}),
    Specimen(
        "llama3-rope",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    Specimen("opt", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, grouped=False),
    Specimen(
        "opt-post-norm",
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        grouped=False,
    ),
    Specimen("phi", "phi", {"qk_layernorm": True}, grouped=False),
    Specimen("mistral", "mistral", {**WINDOW, "head_dim": 16}),
    Specimen("qwen2", "qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    Specimen("qwen3", "qwen3", {"head_dim": 16}),
    Specimen("gemma2", "gemma2", {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}),
    Specimen(
        "gemma3", "gemma3_text", {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3}
    ),
    Specimen("phi3", "phi3", WINDOW),
    Specimen("gpt2", "gpt2", {"n_inner": 48}, grouped=False),
    Specimen("gpt_neox", "gpt_neox", grouped=False),
    Specimen("gpt_neox-sequential", "gpt_neox", {"use_parallel_residual": False}, grouped=False),
    Specimen("smollm3", "smollm3", {**WINDOW, "use_sliding_window": True, "no_rope_layer_interval": 3}),
    Specimen("olmo2", "olmo2"),
    Specimen("granite", "granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    Specimen("starcoder2", "starcoder2", WINDOW),
    Specimen("stablelm", "stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    Specimen("stablelm-parallel", "stablelm", {"use_parallel_residual": True}),
    Specimen(
        "qwen3_moe",
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "head_dim": 8,
        },
    ),
    Specimen("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
)

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 3,
}
MIXED = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "sliding_attention",
    "full_attention",
    "full_attention",
]
DENSE_AND_SPARSE = ["dense", "sparse", "dense", "sparse", "sparse", "sparse"]
CONVOLUTIONS = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]

MODERN = (
    Specimen("apertus", "apertus", {"head_dim": 8}),
    Specimen("arcee", "arcee"),
    Specimen("cohere", "cohere", {"attention_bias": True}),
    Specimen("cohere2", "cohere2", {**WINDOW, "sliding_window_pattern": 3}),
    Specimen("cwm", "cwm", {**WINDOW, "layer_types": MIXED}),
    Specimen("ernie4_5", "ernie4_5", {"head_dim": 8}),
    Specimen("exaone4", "exaone4", {**WINDOW, "sliding_window_pattern": 3}),
    Specimen("gemma", "gemma", {"head_dim": 8}),
    Specimen("glm", "glm", {"head_dim": 8}),
    Specimen("glm4", "glm4", {"head_dim": 8}),
    Specimen("helium", "helium", {"head_dim": 8}),
    Specimen("hunyuan_v1_dense", "hunyuan_v1_dense", {"head_dim": 16}),
    Specimen("hyperclovax", "hyperclovax", {"use_post_norm": True, "residual_multiplier": 0.5}),
    Specimen("internlm3", "internlm3", {"head_dim": 8}),
    Specimen("iquestcoder", "iquestcoder", {"head_dim": 8}),
    Specimen("jais2", "jais2"),
    Specimen("ministral", "ministral", {**WINDOW, "head_dim": 8, "layer_types": MIXED}),
    Specimen("ministral3", "ministral3", {"head_dim": 8}),
    Specimen("nanochat", "nanochat"),
    Specimen("nemotron", "nemotron"),
    Specimen("olmo", "olmo", {"clip_qkv": 1.0}),
    Specimen("olmo3", "olmo3", {**WINDOW, "layer_types": MIXED}),
    Specimen("seed_oss", "seed_oss", {"head_dim": 8}),
    Specimen("vaultgemma", "vaultgemma", {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}),
    Specimen("granite_swa", "granite_swa", {**WINDOW, "layer_rope_theta": [1e4, 1e3, 1e4, 1e5, 1e2, 1e4]}),
    Specimen("bitnet", "bitnet"),
    Specimen("doge", "doge", {"head_dim": 8}),
    Specimen(
        "gemma4",
        "gemma4_text",
        {**WINDOW, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "layer_types": MIXED},
    ),
    Specimen(
        "gemma4_unified",
        "gemma4_unified_text",
        {**WINDOW, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "layer_types": MIXED},
    ),
    Specimen("bloom", "bloom"),
    Specimen("falcon", "falcon", {"new_decoder_architecture": True}),
    Specimen("falcon-alibi", "falcon", {"alibi": True}),
    Specimen("mpt", "mpt"),
    Specimen("gptj", "gptj", {"rotary_dim": 4}),
    Specimen("codegen", "codegen", {"rotary_dim": 4}),
    Specimen("gpt_bigcode", "gpt_bigcode"),
    Specimen("gpt_neox_japanese", "gpt_neox_japanese"),
    Specimen("persimmon", "persimmon"),
    Specimen("biogpt", "biogpt"),
    Specimen("xglm", "xglm", {"ffn_dim": 48}),
    Specimen(
        "afmoe",
        "afmoe",
        {**EXPERTS, **WINDOW, "num_experts": 4, "num_dense_layers": 2, "global_attn_every_n_layers": 3, "head_dim": 8},
    ),
    Specimen("aria_text", "aria_text", {"moe_num_experts": 4, "moe_topk": 2}),
    Specimen(
        "cohere2_moe",
        "cohere2_moe",
        {
            **EXPERTS,
            **WINDOW,
            "num_experts": 4,
            "head_dim": 8,
            "layer_types": MIXED,
            "mlp_layer_types": DENSE_AND_SPARSE,
        },
    ),
    Specimen("deepseek_v2", "deepseek_v2", {**ROUTED, **LATENT, "first_k_dense_replace": 2}),
    Specimen("deepseek_v3", "deepseek_v3", {**ROUTED, **LATENT, "first_k_dense_replace": 2}),
    Specimen(
        "deepseek_v32",
        "deepseek_v32",
        # Every token of a test prompt is selected, as of texts of up to 2,048 tokens in the release.
        {**ROUTED, **LATENT, "first_k_dense_replace": 2, "index_topk": 64, "index_head_dim": 16, "index_n_heads": 2},
    ),
    Specimen("dots1", "dots1", {**ROUTED, **WINDOW, "head_dim": 8, "first_k_dense_replace": 2, "max_window_layers": 3}),
    Specimen(
        "ernie4_5_moe",
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 2,
            "moe_layer_end_index": 4,
        },
    ),
    Specimen(
        "exaone_moe",
        "exaone_moe",
        {
            **EXPERTS,
            **WINDOW,
            "num_experts": 4,
            "num_shared_experts": 1,
            "sliding_window_pattern": 3,
            "mlp_layer_types": DENSE_AND_SPARSE,
        },
    ),
    Specimen("flex_olmo", "flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    Specimen("glm4_moe", "glm4_moe", {**ROUTED, "head_dim": 8, "first_k_dense_replace": 2, "use_qk_norm": True}),
    Specimen("glm4_moe_lite", "glm4_moe_lite", {**ROUTED, **LATENT, "mlp_layer_types": DENSE_AND_SPARSE}),
    Specimen("gpt_oss", "gpt_oss", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    Specimen("granitemoe", "granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Specimen(
        "granitemoeshared",
        "granitemoeshared",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    ),
    Specimen(
        "granitemoe_swa",
        "granitemoe_swa",
        {
            **WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_rope_theta": [1e4, 1e3, 1e4, 1e5, 1e2, 1e4],
        },
    ),
    Specimen("hunyuan_v1_moe", "hunyuan_v1_moe", {"num_experts": 4, "moe_topk": [2, 1, 2, 1, 2, 2], "head_dim": 8}),
    Specimen(
        "hy_v3",
        "hy_v3",
        {**EXPERTS, "num_experts": 4, "num_shared_experts": 1, "head_dim": 8, "mlp_layer_types": DENSE_AND_SPARSE},
    ),
    Specimen("jetmoe", "jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}),
    Specimen(
        "kolibri1",
        "kolibri1",
        {
            **EXPERTS,
            **WINDOW,
            "num_local_experts": 4,
            "shared_expert_intermediate_size": 16,
            "head_dim": 8,
            "layer_types": MIXED,
        },
    ),
    Specimen(
        "laguna",
        "laguna",
        {
            **EXPERTS,
            **WINDOW,
            "num_experts": 4,
            "head_dim": 8,
            "layer_types": MIXED,
            "mlp_layer_types": DENSE_AND_SPARSE,
            "shared_expert_intermediate_size": 16,
            "num_attention_heads_per_layer": [4, 8, 4, 8, 4, 4],
        },
    ),
    Specimen(
        "llama4",
        "llama4_text",
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 24,
            "head_dim": 8,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 8,
        },
    ),
    Specimen(
        "mellum",
        "mellum",
        {
            **EXPERTS,
            **WINDOW,
            "num_experts": 4,
            "head_dim": 8,
            "layer_types": MIXED,
            "mlp_layer_types": DENSE_AND_SPARSE,
        },
    ),
    Specimen(
        "mimo_v2_flash",
        "mimo_v2_flash",
        {
            **ROUTED,
            **WINDOW,
            "head_dim": 8,
            "v_head_dim": 8,
            "swa_head_dim": 8,
            "swa_v_head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "layer_types": MIXED,
            "mlp_layer_types": DENSE_AND_SPARSE,
        },
    ),
    Specimen(
        "kimi_linear",
        "kimi_linear",
        {
            **{name: value for name, value in LATENT.items() if name != "q_lora_rank"},
            **EXPERTS,
            "num_experts": 4,
            "linear_attn_config": {
                "full_attn_layers": [2, 4],
                "kda_layers": [1, 3, 5, 6],
                "head_dim": 8,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
        },
    ),
    Specimen("minicpm3", "minicpm3", {**LATENT, "scale_depth": 1.4}),
    Specimen("minimax_m2", "minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    Specimen("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Specimen("phimoe", "phimoe", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Specimen(
        "qwen2_moe",
        "qwen2_moe",
        {
            **EXPERTS,
            **WINDOW,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
    ),
    Specimen("solar_open", "solar_open", {**ROUTED, "head_dim": 8}),
    Specimen(
        "bailing_hybrid",
        "bailing_hybrid",
        {
            **ROUTED,
            **LATENT,
            "head_dim": 8,
            "num_experts": 4,
            "mlp_layer_types": DENSE_AND_SPARSE,
            "layer_group_size": 3,
        },
    ),
    Specimen("recurrent_gemma", "recurrent_gemma", {"lru_width": 32, "attention_window_size": 4, "head_dim": 8}),
    Specimen("axk1", "axk1", {**ROUTED, **LATENT, "mlp_layer_types": DENSE_AND_SPARSE}),
    Specimen(
        "axk2",
        "axk2",
        {
            **ROUTED,
            **LATENT,
            "mlp_layer_types": DENSE_AND_SPARSE,
            "index_topk": 64,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "gated_norm_rank": 4,
        },
    ),
    Specimen(
        "flint",
        "flint",
        {
            **EXPERTS,
            **WINDOW,
            "num_experts": 4,
            "head_dim": 8,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "layer_types": MIXED,
        },
    ),
    # transformers sets the padding token's embedding to 0 on loading, whatever the checkpoint holds.
    Specimen("youtu", "youtu", {**LATENT, "pad_token_id": None}),
    Specimen("bamba", "bamba", {**MAMBA, "attn_layer_indices": [1, 4]}),
    # One layer of attention alone: whatever is removed, what stays has a period.
    Specimen(
        "jamba",
        "jamba",
        {
            "attn_layer_period": 6,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_dt_rank": 4,
        },
    ),
    Specimen("falcon_h1", "falcon_h1", {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8}),
    Specimen(
        "granitemoehybrid",
        "granitemoehybrid",
        {
            **MAMBA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "layer_types": [
                "linear_attention",
                "full_attention",
                "linear_attention",
                "linear_attention",
                "full_attention",
                "linear_attention",
            ],
        },
    ),
    Specimen(
        "granitemoehybrid-dense",
        "granitemoehybrid",
        {**MAMBA, "num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["full_attention"] * 6},
    ),
    Specimen("lfm2", "lfm2", {"full_attn_idxs": [1, 4]}),
    Specimen("lfm2_moe", "lfm2_moe", {**EXPERTS, "num_experts": 4, "layer_types": CONVOLUTIONS, "num_dense_layers": 2}),
    Specimen("lfm3", "lfm3", {**WINDOW, "head_dim": 8, "layer_types": CONVOLUTIONS}),
    Specimen(
        "nemotron_h",
        "nemotron_h",
        {
            "layers_block_type": [
                "linear_attention",
                "mlp",
                "full_attention",
                "moe",
                "linear_attention",
                "full_attention",
            ],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "head_dim": 8,
            **ROUTED,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    Specimen(
        "olmo_hybrid",
        "olmo_hybrid",
        {
            "layer_types": ["linear_attention", "full_attention"] * 3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
        },
    ),
    Specimen("qwen3_5", "qwen3_5_text", {**LINEAR, "head_dim": 8}),
    Specimen(
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        {**LINEAR, **EXPERTS, "num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16},
    ),
    Specimen(
        "qwen3_next",
        "qwen3_next",
        {
            **LINEAR,
            **EXPERTS,
            "num_experts": 4,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    Specimen("mamba", "mamba", {"state_size": 8, "expand": 2, "time_step_rank": 4}, grouped=False),
    Specimen(
        "mamba2",
        "mamba2",
        {"state_size": 8, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        grouped=False,
    ),
    Specimen("falcon_mamba", "falcon_mamba", {"state_size": 8, "expand": 2, "time_step_rank": 4}, grouped=False),
)
"""Of the other families one or two shapes each, held to the contract's core (test_contract_core.py)."""

PROJECTED, HEAD_NORMED = "opt-post-norm", "stablelm"
"""Of families from which channels can be cut along every axis, the specimens from which they can be cut along ffn alone."""

NARROWABLE = (
    *(
        specimen
        for specimen in SPECIMENS
        if FAMILIES[specimen.model_type].layout and specimen.name not in (PROJECTED, HEAD_NORMED)
    ),
    Specimen(
        "opt-post-norm-whole",
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        grouped=False,
    ),
    Specimen("stablelm-biased", "stablelm", {"use_qkv_bias": True}),
)
"""The specimens from which channels can be cut along every axis."""

FFN_ONLY = tuple(specimen for specimen in SPECIMENS if specimen.name in (PROJECTED, HEAD_NORMED))

AXES_CUT: tuple[tuple[Axis, ...], ...] = (*((axis,) for axis in AXES), AXES)
"""Each axis alone, and all of them together."""


def widths_of(model: PreTrainedModel) -> Widths:
    """Return the widths that the model's config states."""
    return layout_of(FAMILIES[model.config.model_type]).widths(model.config.to_dict())


def draw_channels(
    model: PreTrainedModel,
    axes: Sequence[Axis] = AXES,
    ratios: Mapping[Axis, float] | None = None,
    seed: int = 0,
    multiple: int | None = None,
) -> Channels:
    """Draw channels to remove, others in every layer: half of each of `axes`, or what `ratios` ask for."""
    family, config = FAMILIES[model.config.model_type], model.config.to_dict()
    counts = channels_to_remove(family, config, ratios or dict.fromkeys(axes, 0.5), multiple)
    widths = widths_of(model)
    draw = random.Random(seed)

    def some(axis: Axis) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(widths.of(axis)), counts.get(axis, 0))))

    def of_each_layer(axis: Axis) -> tuple[tuple[int, ...], ...]:
        return tuple(some(axis) for _ in range(family.layers(config))) if axis in counts else ()

    return Channels(hidden=some("hidden"), ffn=of_each_layer("ffn"), heads=of_each_layer("heads"))


@torch.no_grad()
def scale_slices(model: PreTrainedModel, channels: Channels, factor: float) -> None:
    """Scale, in place, what the cut takes away of every weight: the rows and columns W_R."""
    family, widths = FAMILIES[model.config.model_type], widths_of(model)
    for name, weight in model.named_parameters():
        block = family.block_of(name)
        at = channels.at(block[0] if block else None)
        for dimension, rows in enumerate(kept_rows(layout_of(family), widths, name, weight.shape, at)):
            if rows is not None:
                scale = torch.full((weight.shape[dimension],), factor).index_fill(0, torch.tensor(rows), 1.0)
                weight *= scale.unflatten(0, [-1] + [1] * (weight.ndim - 1 - dimension))


def release(model: PreTrainedModel, folder: Path, shard: str = "5GB") -> Path:
    """Save the model as a release would be: weights, tokenizer, chat template, generation config and licence."""
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 2}\n')
    (folder / "LICENSE").write_text("Take it.\n")
    return folder


HEADS_OF = {"deepseek_v3": "model.layers.4.eh_proj.weight", "qwen3_next": "mtp.fc.weight"}
"""Specimens of four layers → a tensor of a head for multi-token prediction: in a block beyond the count, and with a name of its own."""


def release_with_head(name: str, folder: Path) -> Path:
    """Save a specimen of `HEADS_OF` as a release that holds a head for multi-token prediction."""
    specimen = next(specimen for specimen in MODERN if specimen.name == name)
    release(specimen.model(4), folder)
    tensors = load_file(folder / WEIGHTS) | {HEADS_OF[name]: torch.ones(32, 64)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if HEADS in FAMILIES[config["model_type"]].per_layer:
        config[HEADS] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words w3, w4, …, with a chat template."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def prompts(padding: Sequence[int] = (0, 0, 7)) -> tuple[Tensor, Tensor]:
    """Return (tokens, attention mask), each (batch, LENGTH), a row padded on the left by each number of `padding`."""
    tokens = torch.randint(3, VOCABULARY, (len(padding), LENGTH), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(LENGTH).expand_as(tokens) >= torch.tensor(padding)[:, None]).long()
    return tokens * mask, mask


@torch.no_grad()
def logits(model: PreTrainedModel, padding: Sequence[int] = (0, 0, 7), **settings: Any) -> Tensor:
    """Return the logits of the real tokens of `prompts`, (tokens, vocabulary)."""
    tokens, mask = prompts(padding)
    return model(input_ids=tokens, attention_mask=mask, **settings).logits[mask.bool()]


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """How often the attention of each block runs: a bypassed block does not run it."""
    calls = [0 for _ in blocks(model)]

    def count(layer: int) -> None:
        calls[layer] += 1

    with ExitStack() as stack:
        for layer, block in enumerate(blocks(model)):
            hook = block.self_attn.register_forward_hook(lambda *_, layer=layer: count(layer))
            stack.callback(hook.remove)
        yield calls
