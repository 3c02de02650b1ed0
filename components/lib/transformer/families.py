"""The table of model families, and refusals for all other models.

A family is found by the exact `model_type` of its config.json. Its row (`family.Family`) states the path of the blocks and the config
fields that speak of single layers, each with the rule that keeps it true after a cut. A model type without a row, or a field that
speaks of layers and is in no row, is refused by name: a cut that does not change such a field loads without a warning and is wrong.

How to add a family: docs/families.md. Nothing here imports torch or transformers, so a refusal is immediate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from components.lib.errors import Refusal
from components.lib.transformer.family import (
    GONE,
    HEADS,
    Config,
    Family,
    counted_from_one,
    dense_layers,
    every_layer,
    first_sparse,
    indices,
    keyed,
    last_sparse,
    leading,
    letters,
    no_heads,
    one_each,
    one_each_if_listed,
    periodic,
    repeated,
    scaled_by_depth,
    spelled_out,
    unchanged,
)
from components.lib.transformer.layout import (
    ATTENTION,
    ENDS,
    FUSED,
    GATED,
    HEAD_NORMS,
    LLAMA,
    NORMS,
    POST_NORMS,
    SANDWICH,
    UNGATED,
    Layout,
    text_part,
    with_text,
)
from components.lib.transformer.unsupported import UNSUPPORTED
from components.lib.transformer.wrappers import WRAPPERS

_TYPED = MappingProxyType({"layer_types": one_each})
_WINDOWED = MappingProxyType({"layer_types": one_each, "max_window_layers": leading})
_PATTERN = MappingProxyType({"sliding_window_pattern": spelled_out, "_sliding_window_pattern": spelled_out})
_SWA = MappingProxyType({"layer_types": one_each, "layer_rope_theta": one_each})
_SPARSE = MappingProxyType({"mlp_layer_types": one_each})
_DENSE_FIRST = MappingProxyType({"first_k_dense_replace": leading, "moe_layer_freq": unchanged, HEADS: no_heads})
_INDEXED = MappingProxyType({**_DENSE_FIRST, **_SPARSE, **_TYPED, "first_k_dense_replace": spelled_out})
_EVERY_LAYER = MappingProxyType(
    {"moe_layer_freq": (1, "makes every n-th layer sparse, and a cut leaves no such period")}
)
_QWEN_MOE = MappingProxyType({**_WINDOWED, "mlp_only_layers": dense_layers, "decoder_sparse_step": every_layer})
_LINEAR = MappingProxyType(
    {"layer_types": one_each, "full_attention_interval": spelled_out, "mtp_num_hidden_layers": no_heads}
)
_GLM4 = Layout(
    {
        **ATTENTION,
        **FUSED,
        **NORMS,
        "post_self_attn_layernorm": "hidden",
        "post_mlp_layernorm": "hidden",
        **ENDS,
    }
)
_LFM2 = MappingProxyType({"layer_types": one_each, "full_attn_idxs": indices})
_GEMMA4 = MappingProxyType(
    {
        "layer_types": one_each,
        "per_layer_config": keyed,
        "vocab_size_per_layer_input": unchanged,
        "hidden_size_per_layer_input": unchanged,
        "num_kv_shared_layers": unchanged,
    }
)
_GEMMA4_LAST = "the config class makes the last layer one of full attention, whatever its list of types says"
_GEMMA4_SHARES = MappingProxyType(
    {
        "hidden_size_per_layer_input": "packs an embedding of every layer into one table",
        "num_kv_shared_layers": "lets the last layers read the keys and values of earlier ones",
    }
)

_gemma4 = partial(
    Family,
    per_layer=_GEMMA4,
    unsupported=_GEMMA4_SHARES,
    fixed=lambda config, layers: (layers - 1,),
    why_fixed=_GEMMA4_LAST,
    layout=None,
)
_of_experts = partial(Family, layout=None, layers_only="is a mixture of experts")
_of_like_experts = partial(_of_experts, experts=True)
_of_tuples = partial(Family, tuples=True)
_hybrid = partial(Family, layout=None, layers_only="has state-space layers, linear attention or convolutions")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        row.model_type: row
        for row in (
            Family("llama", "Llama 2 and 3", layout=replace(LLAMA, divides=True)),
            Family(
                "opt",
                "OPT",
                blocks="model.decoder.layers",
                layout=Layout(
                    {
                        **ATTENTION,
                        "out_proj": "hidden query",
                        "fc1": "ffn hidden",
                        "fc2": "hidden ffn",
                        "self_attn_layer_norm": "hidden",
                        "final_layer_norm": "hidden",
                        "embed_tokens": "any hidden",
                        "embed_positions": "any hidden",
                        "lm_head": "any hidden",
                    },
                    hidden=("hidden_size", "word_embed_proj_dim"),
                    ffn="ffn_dim",
                    groups=None,
                    head=None,
                    norm_first="do_layer_norm_before",
                ),
            ),
            Family(
                "phi",
                "Phi-1, 1.5 and 2",
                layout=Layout(
                    {
                        **ATTENTION,
                        "self_attn.dense": "hidden query",
                        "fc1": "ffn hidden",
                        "fc2": "hidden ffn",
                        "q_layernorm": "any",
                        "k_layernorm": "any",
                        "input_layernorm": "hidden",
                        "final_layernorm": "hidden",
                        **ENDS,
                    },
                    head=None,
                ),
            ),
            Family("mistral", "Mistral"),
            Family("qwen2", "Qwen2 and 2.5", per_layer=_WINDOWED),
            Family("qwen3", "Qwen3", per_layer=_WINDOWED, layout=Layout({**LLAMA.modules, **HEAD_NORMS})),
            Family(
                "gemma2",
                "Gemma 2",
                per_layer=_TYPED,
                layout=Layout({**LLAMA.modules, **SANDWICH}, divides=True, scaled_embedding=True),
            ),
            Family(
                "gemma3_text",
                "Gemma 3 (text)",
                per_layer={**_TYPED, "sliding_window_pattern": spelled_out, "_sliding_window_pattern": spelled_out},
                layout=Layout({**LLAMA.modules, **SANDWICH, **HEAD_NORMS}, divides=True, scaled_embedding=True),
            ),
            Family(
                "phi3",
                "Phi-3",
                layout=Layout(
                    {
                        "qkv_proj": "query+key+key hidden",
                        "o_proj": "hidden query",
                        "gate_up_proj": "ffn+ffn hidden",
                        "down_proj": "hidden ffn",
                        **NORMS,
                        **ENDS,
                    }
                ),
            ),
            Family(
                "gpt2",
                "GPT-2",
                blocks="transformer.h",
                count="n_layer",
                unsupported={
                    "scale_attn_by_inverse_layer_idx": "scales attention by each layer's index, and a cut renumbers the layers",
                    "add_cross_attention": "lets the blocks read an encoder",
                },
                layout=Layout(
                    {
                        "c_attn": "query+key+key hidden",
                        "attn.c_proj": "hidden query",
                        "c_fc": "ffn hidden",
                        "mlp.c_proj": "hidden ffn",
                        "ln_1": "hidden",
                        "ln_2": "hidden",
                        "ln_f": "hidden",
                        "wte": "any hidden",
                        "wpe": "any hidden",
                        "lm_head": "any hidden",
                    },
                    hidden=("n_embd",),
                    ffn="n_inner",
                    heads="n_head",
                    groups=None,
                    head=None,
                    transposed=True,
                ),
            ),
            Family(
                "gpt_neox",
                "GPT-NeoX and Pythia",
                blocks="gpt_neox.layers",
                layout=Layout(
                    {
                        "query_key_value": "qkv hidden",
                        "attention.dense": "hidden query",
                        "dense_h_to_4h": "ffn hidden",
                        "dense_4h_to_h": "hidden ffn",
                        "input_layernorm": "hidden",
                        "post_attention_layernorm": "hidden",
                        "final_layer_norm": "hidden",
                        "embed_in": "any hidden",
                        "embed_out": "any hidden",
                        "lm_head": "any hidden",
                    },
                    groups=None,
                    head=None,
                ),
            ),
            Family(
                "smollm3",
                "SmolLM3",
                per_layer={**_WINDOWED, "no_rope_layers": one_each, "no_rope_layer_interval": spelled_out},
            ),
            Family(
                "olmo2",
                "OLMo 2",
                layout=Layout({**LLAMA.modules, **SANDWICH, "q_norm": "query", "k_norm": "key"}),
            ),
            Family("granite", "Granite"),
            Family(
                "starcoder2",
                "StarCoder2",
                layout=Layout({**ATTENTION, "c_fc": "ffn hidden", "c_proj": "hidden ffn", **NORMS, **ENDS}),
            ),
            Family("stablelm", "StableLM", layout=replace(LLAMA, head=None)),
            _of_like_experts("qwen3_moe", "Qwen3-MoE", per_layer=_QWEN_MOE),
            _of_like_experts("mixtral", "Mixtral"),
            Family(
                "apertus",
                "Apertus",
                layout=Layout(
                    {
                        **ATTENTION,
                        **UNGATED,
                        **HEAD_NORMS,
                        "act_fn": "any",
                        "attention_layernorm": "hidden",
                        "feedforward_layernorm": "hidden",
                        "norm": "hidden",
                        **ENDS,
                    }
                ),
            ),
            Family("arcee", "Arcee AFM", layout=Layout({**ATTENTION, **UNGATED, **NORMS, **ENDS}, divides=True)),
            Family("cohere", "Command R"),
            Family(
                "cohere2",
                "Command R7B and Command A (Cohere 2)",
                per_layer={
                    **_TYPED,
                    **_PATTERN,
                    "layer_switch": spelled_out,
                    "order_of_interleaved_layers": spelled_out,
                },
                layout=replace(LLAMA, head=None),
            ),
            Family("cwm", "Code World Model", per_layer=_TYPED, layout=replace(LLAMA, divides=True)),
            Family("ernie4_5", "ERNIE 4.5"),
            Family(
                "exaone4",
                "EXAONE 4",
                per_layer={**_TYPED, **_PATTERN},
                layout=Layout({**ATTENTION, **GATED, **HEAD_NORMS, **POST_NORMS, **ENDS}),
            ),
            Family("gemma", "Gemma", layout=replace(LLAMA, scaled_embedding=True)),
            Family("glm", "GLM-4 (2024)", layout=Layout({**ATTENTION, **FUSED, **NORMS, **ENDS})),
            Family("glm4", "GLM-4 (0414)", layout=_GLM4),
            Family("helium", "Helium"),
            Family(
                "hunyuan_v1_dense",
                "Hunyuan (dense)",
                layout=Layout({**LLAMA.modules, "query_layernorm": "any", "key_layernorm": "any"}),
            ),
            Family(
                "hyperclovax",
                "HyperCLOVA X",
                layout=Layout({**LLAMA.modules, "post_norm1": "hidden", "post_norm2": "hidden"}, divides=True),
            ),
            Family("internlm3", "InternLM 3"),
            Family("iquestcoder", "IQuest Coder"),
            Family("jais2", "Jais 2", layout=Layout({**ATTENTION, **UNGATED, **NORMS, **ENDS}, divides=True)),
            Family("minicpm3", "MiniCPM 3", per_layer={"scale_depth": scaled_by_depth}, layout=None),
            Family("ministral", "Ministral", per_layer=_TYPED),
            Family("ministral3", "Ministral 3"),
            Family("nanochat", "nanochat", layout=None),
            Family("nemotron", "Nemotron", layout=Layout({**ATTENTION, **UNGATED, **NORMS, **ENDS})),
            Family("olmo", "OLMo", layout=None),
            Family(
                "olmo3",
                "OLMo 3",
                per_layer=_TYPED,
                layout=Layout({**LLAMA.modules, **SANDWICH, "q_norm": "query", "k_norm": "key"}),
            ),
            Family("seed_oss", "Seed-OSS"),
            Family(
                "vaultgemma",
                "VaultGemma",
                per_layer=_TYPED,
                layout=Layout(
                    {**LLAMA.modules, "pre_feedforward_layernorm": "hidden"}, divides=True, scaled_embedding=True
                ),
            ),
            Family("granite_swa", "Granite with sliding windows", per_layer=_SWA, layout=None),
            Family("bitnet", "BitNet (bf16 weights)", layout=None),
            Family("doge", "Doge", layout=None),
            Family("youtu", "Youtu-LLM", layout=None),
            _gemma4("gemma4_text", "Gemma 4 (text)"),
            _gemma4("gemma4_unified_text", "Gemma 4 unified (text)"),
            _of_tuples("bloom", "BLOOM", blocks="transformer.h", count="n_layer", layout=None),
            _of_tuples("falcon", "Falcon", blocks="transformer.h", layout=None),
            _of_tuples("mpt", "MPT", blocks="transformer.blocks", count="n_layers", layout=None),
            _of_tuples("gptj", "GPT-J", blocks="transformer.h", count="n_layer", layout=None),
            _of_tuples("codegen", "CodeGen", blocks="transformer.h", count="n_layer", layout=None),
            Family("gpt_bigcode", "StarCoder (GPT BigCode)", blocks="transformer.h", count="n_layer", layout=None),
            _of_tuples("gpt_neox_japanese", "GPT-NeoX Japanese", blocks="gpt_neox_japanese.layers", layout=None),
            Family("persimmon", "Persimmon", layout=None),
            Family("biogpt", "BioGPT", blocks="biogpt.layers", layout=None),
            Family("xglm", "XGLM", count="num_layers", layout=None),
            # Mixtures of experts
            _of_like_experts(
                "afmoe",
                "Arcee Trinity (AFMoE)",
                per_layer={**_TYPED, "num_dense_layers": leading, "global_attn_every_n_layers": spelled_out},
            ),
            _of_like_experts("aria_text", "Aria (text)"),
            _of_like_experts(
                "cohere2_moe",
                "Cohere 2 (experts)",
                per_layer={
                    **_SPARSE,
                    **_TYPED,
                    **_PATTERN,
                    "first_k_dense_replace": spelled_out,
                    # Read as it stands, beside the lists: whether dense layers attend without a window.
                    "prefix_dense_sliding_window_pattern": unchanged,
                },
            ),
            _of_like_experts(
                "axk1", "A.X K1", per_layer={**_SPARSE, "first_k_dense_replace": spelled_out, HEADS: no_heads}
            ),
            _of_like_experts("axk2", "A.X K2", per_layer=_INDEXED, required=_EVERY_LAYER),
            _of_like_experts("deepseek_v2", "DeepSeek V2", per_layer=_DENSE_FIRST, required=_EVERY_LAYER),
            _of_like_experts("deepseek_v3", "DeepSeek V3 and R1", per_layer=_DENSE_FIRST, required=_EVERY_LAYER),
            _of_like_experts("deepseek_v32", "DeepSeek V3.2", per_layer=_INDEXED, required=_EVERY_LAYER),
            _of_like_experts("dots1", "dots.llm1", per_layer={**_DENSE_FIRST, **_WINDOWED}, required=_EVERY_LAYER),
            _of_like_experts(
                "ernie4_5_moe",
                "ERNIE 4.5 (experts)",
                per_layer={
                    "moe_layer_start_index": first_sparse,
                    "moe_layer_end_index": last_sparse,
                    "moe_layer_interval": unchanged,
                    HEADS: no_heads,
                },
                required={"moe_layer_interval": (1, "makes every n-th layer sparse, and a cut leaves no such period")},
                ignored=("mtp", "model.mtp"),
            ),
            _of_like_experts(
                "exaone_moe",
                "K-EXAONE",
                per_layer={**_SPARSE, **_TYPED, **_PATTERN, "first_k_dense_replace": spelled_out, HEADS: no_heads},
                ignored=("mtp",),
            ),
            _of_like_experts("flex_olmo", "FlexOlmo"),
            _of_like_experts("flint", "Flint", per_layer=_QWEN_MOE),
            _of_like_experts("glm4_moe", "GLM-4.5 to 4.7", per_layer=_DENSE_FIRST, required=_EVERY_LAYER),
            _of_like_experts(
                "glm4_moe_lite",
                "GLM-4.7 Flash",
                per_layer={**_SPARSE, "first_k_dense_replace": spelled_out, HEADS: no_heads},
            ),
            _of_like_experts("gpt_oss", "gpt-oss", per_layer=_TYPED),
            _of_like_experts("granitemoe", "Granite (experts)"),
            _of_like_experts("granitemoeshared", "Granite (experts, one shared)"),
            _of_like_experts("granitemoe_swa", "Granite with sliding windows (experts)", per_layer=_SWA),
            _of_experts(
                "hunyuan_v1_moe",
                "Hunyuan (experts)",
                experts_stay="may have another number of experts in every layer",
                per_layer={
                    "num_experts": one_each_if_listed,
                    "moe_topk": one_each_if_listed,
                    "num_shared_expert": one_each_if_listed,
                    "moe_intermediate_size": one_each_if_listed,
                },
                unsupported={"use_cla": "lets layers read the keys and values of other layers"},
            ),
            _of_like_experts(
                "hy_v3", "Hunyuan 3", per_layer={**_SPARSE, "first_k_dense_replace": spelled_out, HEADS: no_heads}
            ),
            _of_experts("jetmoe", "JetMoE", experts_stay="routes its attention too"),
            _of_like_experts("kolibri1", "Kolibri", per_layer=_TYPED),
            _of_like_experts(
                "laguna", "Laguna", per_layer={**_SPARSE, **_TYPED, "num_attention_heads_per_layer": one_each}
            ),
            _of_experts(
                "llama4_text",
                "Llama 4 (text)",
                experts_stay="gives every expert every token, scaled by the router",
                per_layer={
                    **_TYPED,
                    "no_rope_layers": one_each,
                    "no_rope_layer_interval": spelled_out,
                    "moe_layers": indices,
                    "interleave_moe_layer_step": spelled_out,
                },
            ),
            _of_like_experts(
                "mellum", "Mellum", per_layer={**_SPARSE, **_TYPED, "num_mtp_layers": no_heads}, ignored=("mtp.",)
            ),
            _of_like_experts(
                "mimo_v2_flash", "MiMo V2 Flash", per_layer={**_SPARSE, **_TYPED}, ignored=("model.mtp.",)
            ),
            _of_like_experts(
                "minimax_m2", "MiniMax M2", per_layer={"attn_type_list": one_each, "mtp_transformer_layers": unchanged}
            ),
            _of_like_experts("olmoe", "OLMoE"),
            _of_like_experts("phimoe", "Phi-3.5-MoE"),
            _of_like_experts("qwen2_moe", "Qwen1.5-MoE and Qwen2-MoE", per_layer=_QWEN_MOE),
            _of_like_experts("solar_open", "Solar Open", per_layer=_DENSE_FIRST, required=_EVERY_LAYER),
            # Hybrids of attention with state-space layers, linear attention or convolutions
            _hybrid(
                "bailing_hybrid",
                "Ling 2.5 (Bailing hybrid)",
                experts=True,
                per_layer={
                    **_SPARSE,
                    **_TYPED,
                    "first_k_dense_replace": spelled_out,
                    "layer_group_size": spelled_out,
                    HEADS: no_heads,
                },
            ),
            _hybrid("bamba", "Bamba", tuples=True, per_layer={"attn_layer_indices": indices}),
            _hybrid("falcon_h1", "Falcon-H1", tuples=True),
            _hybrid("granitemoehybrid", "Granite 4", experts=True, per_layer={**_TYPED, "layers_block_type": one_each}),
            _hybrid(
                "jamba",
                "Jamba",
                per_layer={
                    f"{kind}_layer_{part}": periodic for kind in ("attn", "expert") for part in ("period", "offset")
                },
            ),
            _hybrid(
                "kimi_linear",
                "Kimi Linear",
                experts=True,
                per_layer={
                    **_SPARSE,
                    **_TYPED,
                    "linear_attn_config": counted_from_one,
                    "linear_attn_config.full_attn_layers": unchanged,
                    "linear_attn_config.kda_layers": unchanged,
                    "first_k_dense_replace": spelled_out,
                    "moe_layer_freq": unchanged,
                    HEADS: no_heads,
                },
                required=_EVERY_LAYER,
            ),
            _hybrid("lfm2", "LFM2", per_layer=_LFM2),
            _hybrid("lfm2_moe", "LFM2 (experts)", experts=True, per_layer={**_LFM2, "num_dense_layers": leading}),
            _hybrid("lfm3", "LFM3", per_layer=_LFM2),
            _hybrid(
                "nemotron_h",
                "Nemotron-H and Nemotron 3",
                experts=True,
                stored=("backbone.layers",),
                counted_by="layers_block_type",
                per_layer={
                    "layers_block_type": one_each,
                    "hybrid_override_pattern": letters,
                    "mtp_layers_block_type": unchanged,
                    "mtp_hybrid_override_pattern": unchanged,
                    HEADS: no_heads,
                },
                ignored=("mtp",),
            ),
            _hybrid("olmo_hybrid", "OLMo Hybrid", per_layer=_TYPED, ignored=("mtp",)),
            _hybrid("qwen3_5_text", "Qwen3.5 (text)", per_layer=_LINEAR, ignored=("mtp",)),
            _hybrid("qwen3_5_moe_text", "Qwen3.5-MoE (text)", experts=True, per_layer=_LINEAR, ignored=("mtp",)),
            _hybrid("qwen3_next", "Qwen3-Next", experts=True, per_layer={**_LINEAR, **_QWEN_MOE}, ignored=("mtp",)),
            _hybrid("recurrent_gemma", "RecurrentGemma", per_layer={"block_types": repeated}),
            _hybrid("mamba", "Mamba", blocks="backbone.layers", per_layer={"n_layer": leading}),
            _hybrid("mamba2", "Mamba 2", blocks="backbone.layers", per_layer={"n_layer": leading}),
            _hybrid("falcon_mamba", "Falcon Mamba", blocks="backbone.layers", per_layer={"n_layer": leading}),
        )
    }
)
"""Every supported family by its `model_type`."""

TOWERS: Mapping[str, Family] = MappingProxyType(
    {
        row.model_type: row
        for row in (
            Family("qwen2_vl_text", "Qwen2-VL (text)", per_layer=_WINDOWED, layout=replace(LLAMA, head=None)),
            Family("qwen2_5_vl_text", "Qwen2.5-VL (text)", per_layer=_WINDOWED, layout=replace(LLAMA, head=None)),
            Family("qwen3_vl_text", "Qwen3-VL (text)", layout=Layout({**LLAMA.modules, **HEAD_NORMS})),
            _of_like_experts(
                "qwen3_vl_moe_text",
                "Qwen3-VL (text, experts)",
                per_layer={"mlp_only_layers": dense_layers, "decoder_sparse_step": every_layer},
            ),
            Family("glm4v_text", "GLM-4.1V (text)", layout=replace(_GLM4, head=None)),
            Family("glm_ocr_text", "GLM-OCR (text)", per_layer={HEADS: no_heads}, layout=_GLM4),
            Family("paddleocr_vl_text", "PaddleOCR-VL (text)"),
            _of_like_experts("glm4v_moe_text", "GLM-4.5V (text)", per_layer=_DENSE_FIRST, required=_EVERY_LAYER),
            _of_like_experts("mistral4", "Mistral 4 (text)", per_layer={"first_k_dense_replace": leading}),
        )
    }
)
"""Text models that exist in a wrapper only: transformers has no class that loads them alone."""


def family_of(config: Config, remote_code: bool = False) -> Family:
    """Return the family of a config.json.

    Raises:
        Refusal: the model is encoder-decoder, multimodal, quantised, runs code of its own without `remote_code`, is of
            an unknown family, or has a field that speaks of layers and that its row does not know.
    """
    _refuse_kinds(config, remote_code)
    family = family_for(config)
    config = text_part(config)
    layers = family.layers(config)
    for name, reason in family.unsupported.items():
        if config.get(name):
            raise Refusal(f"config.json's {name} is {config[name]!r}, which {reason}: choose a model without it")
    for name, (value, reason) in family.required.items():
        if config.get(name, value) != value:
            raise Refusal(
                f"config.json's {name} is {config[name]!r}, which {reason}: choose a model in which it is {value!r}"
            )
    for name, value, why in _speaking_of_layers(config, layers):
        if name not in family.per_layer and name != family.count:
            raise Refusal(
                f"config.json's field {name} is {_short(value)}, which {why}, and the row {family.model_type!r} of "
                "components/lib/transformer/families.py does not say how it changes with a cut: add it there (docs/families.md shows how)"
            )
    _check_lists(config, family, layers)
    return family


def family_for(config: Config) -> Family:
    """Return the row of a config, of a wrapper that of its text model in it. Raises Refusal if there is none."""
    kinds = config.get("model_type"), text_part(config).get("model_type")
    for kind in kinds:
        if kind is not None:
            _require_word(kind)
    return row_of(*kinds)


@cache
def row_of(model_type: str | None, text_type: str | None) -> Family:
    """Return the row of a `model_type`; of a wrapper, that of a text model of `text_type` in it. Raises Refusal if there is none."""
    wrapper = WRAPPERS.get(str(model_type))
    if wrapper is None:
        return family_named(model_type)
    # Older configs state the text model's fields beside the wrapper's (Qwen2-VL).
    text_type = wrapper.text if text_type in (None, model_type) else text_type
    return wrapper.around(TOWERS.get(str(text_type)) or family_named(text_type))


def _require_word(model_type: object) -> str:
    if isinstance(model_type, str):
        return model_type
    raise Refusal(
        f"the model type {_short(model_type)} is not supported: a config.json names one in words, so get the release again"
    )


def family_named(model_type: object) -> Family:
    """Return the row of a `model_type`. Raises Refusal if there is none."""
    model_type = _require_word(model_type)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in UNSUPPORTED:
        raise Refusal(
            f"the model type {model_type!r} is not supported, since it {UNSUPPORTED[model_type]}: choose a model of a type that "
            "docs/families.md lists"
        )
    raise Refusal(
        f"the model type {_short(model_type)} is not supported: supported are {', '.join(FAMILIES)}; docs/families.md shows how to add a family"
    )


def cut_config(config: Config, family: Family, layers: Sequence[int]) -> dict[str, Any]:
    """Return the config of the model without `layers`, every per-layer field in step.

    Args:
        config: a config with all its per-layer lists written out.
        family: its row.
        layers: indices of the layers to remove.

    Raises:
        Refusal: an index is not of this model, or no layer would stay.
    """
    kept = kept_layers(family.layers(config), layers)
    fixed = sorted(set(layers) - set(family.removable(config)))
    if fixed:
        raise Refusal(f"layer {fixed[0]} of {family.title} cannot be removed, since {family.why_fixed}: keep it")
    whole, config = config, text_part(config)
    cut = dict(config)
    for name, rule in family.per_layer.items():
        if config.get(name) is None:
            continue
        value = rule(config, name, kept)
        if value is GONE:
            del cut[name]
        else:
            cut[name] = value
    if family.count in cut or family.counted_by is None:
        cut[family.count] = len(kept)
    return with_text(whole, cut)


def check_attention(config: Config, removed: Sequence[int]) -> None:
    """Check that a layer of attention stays, if the model has such layers: transformers counts the tokens of a cache there.

    Args:
        config: a config with its per-layer lists written out.
        removed: indices of the layers to remove.

    Raises:
        Refusal: layers of linear attention, convolutions or states alone would stay, and the result could not generate.
    """
    config = text_part(config)
    kinds = config.get("layer_types") or config.get("layers_block_type") or ()
    attention = {n for n, kind in enumerate(kinds) if str(kind).endswith("attention") and kind != "linear_attention"}
    if attention and attention <= set(removed):
        raise Refusal(
            f"the layers that were chosen, {', '.join(map(str, sorted(removed)))}, hold every layer of attention of the model, and transformers does not "
            "generate without one: lower the ratio, or name another method"
        )


def kept_layers(count: int, removed: Sequence[int]) -> list[int]:
    """Return the indices of the layers that stay, ascending. Raises Refusal for an index out of range, or when none stays."""
    foreign = sorted(layer for layer in set(removed) if not 0 <= layer < count)
    if foreign:
        raise Refusal(f"the layers to remove hold {foreign}, but the model has layers 0 to {count - 1}: name those")
    if len(set(removed)) == count:
        raise Refusal(f"all {count} layers would be removed: keep at least one")
    return [layer for layer in range(count) if layer not in set(removed)]


def _refuse_kinds(config: Config, remote_code: bool) -> None:
    """Refuse the kinds of model that no row can describe, before the model type is looked at."""
    kind = config.get("model_type")
    parts = [name for name in config if name in ("text_config", "vision_config", "audio_config")]
    if parts and str(kind) not in WRAPPERS:
        raise Refusal(
            f"the model type {kind!r} wraps a text model with others (config.json has {', '.join(parts)}): save its text model alone and name that folder"
        )
    if config.get("is_encoder_decoder"):
        raise Refusal(f"the model type {kind!r} is an encoder-decoder, and only decoders are pruned: name a decoder")
    for name in ("quantization_config", "compression_config"):
        stated = config.get(name) or text_part(config).get(name)
        if stated:
            raise Refusal(
                f"config.json's {name} says the weights are quantised{_method(stated)}: prune the full-precision release"
                f"{_full_precision(config)}, and quantise the result"
            )
    if config.get("auto_map") and not remote_code:
        raise Refusal(
            "config.json's auto_map names code that comes with the model, which is not run: delete auto_map from a copy of the "
            f"release to use transformers' own {kind!r}, or pass remote_code=True in Python if you trust it"
        )


PACKINGS = ("fp8", "mxfp4")
"""The quantisations that are undone when a release is pinned (`dequantise.py`)."""


def packing_of(config: Config) -> str | None:
    """Return the quantisation of a release's weights if it is undone when the release is pinned; None for all others."""
    method = quantisation_of(config).get("quant_method")
    return method if method in PACKINGS else None


def quantisation_of(config: Config) -> Config:
    """Return what a config says of the quantisation of its weights; empty if it says nothing."""
    stated = config.get("quantization_config") or text_part(config).get("quantization_config")
    return stated if isinstance(stated, Mapping) else {}


def full_precision(config: Config) -> dict[str, Any]:
    """Return the config of a release after it is pinned: without a quantisation that is undone then."""
    if packing_of(config) is None:
        return dict(config)
    text = {name: value for name, value in text_part(config).items() if name != "quantization_config"}
    full = {name: value for name, value in with_text(config, text).items() if name != "quantization_config"}
    return full if {"dtype", "torch_dtype"} & full.keys() else full | {"dtype": "bfloat16"}


def _method(quantisation: object) -> str:
    """Say how the weights are quantised, if the config says it."""
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
    return f" ({method})" if method else ""


def _full_precision(config: Config) -> str:
    """Name the release that a quantised one was made from, if its config does: by a field for it, or by the Hub id it was loaded from."""
    names = (config.get(field) for field in ("base_model", "base_model_name_or_path", "_name_or_path"))
    found = next(
        (name for name in names if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)), None
    )
    return f" (its config names {found})" if found else ""


# Fields of any config that name layers in words only, or that are lists of something else.
_NOT_PER_LAYER = frozenset(
    (
        "layer_norm_eps",
        "layer_norm_epsilon",
        "layernorm_epsilon",
        "layerdrop",
        "qk_layernorm",
        "do_layer_norm_before",
        "_remove_final_layer_norm",
        "layer_norm_elementwise_affine",
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "keys_to_ignore_at_inference",
        "id2label",
        "label2id",
        "task_specific_params",
        "rope_scaling",
        "rope_parameters",
        "auto_map",
    )
)
_OTHER_TOWERS = frozenset(("vision_config", "audio_config", "vision_feature_layer"))
"""What a wrapper says of its other towers."""
_WORDS = re.compile(r"layer|pattern|interval|period|every_n|first_k|sparse_step")


def _speaking_of_layers(config: Config, layers: int, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted name, value, why) of every field that may speak of single layers."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if key in _NOT_PER_LAYER or key in _OTHER_TOWERS or value is None or value is False or value in ([], {}):
            continue
        why = _speaks_of_layers(key, value, layers)
        if why:
            yield name, value, why
        elif isinstance(value, Mapping):
            yield from _speaking_of_layers(value, layers, f"{name}.")


def _speaks_of_layers(key: str, value: Any, layers: int) -> str | None:
    """Say why a field may speak of single layers, or None. The value is judged, and not only the name, so that new fields are found too."""
    if isinstance(value, list) and len(value) == layers:
        return f"has as many entries as there are layers ({layers})"
    if isinstance(value, list) and all(type(entry) is int and 0 <= entry < layers for entry in value):
        return f"may be indices into the {layers} layers"
    if isinstance(value, Mapping) and all(str(entry).isdigit() and int(entry) < layers for entry in value):
        return f"is keyed by what may be indices into the {layers} layers"
    return "speaks of layers by its name" if _WORDS.search(key) else None


def _check_lists(config: Config, family: Family, layers: int) -> None:
    """Refuse a known per-layer list that is shorter than the model, or an index that is not in it."""
    for name, rule in family.per_layer.items():
        value = config.get(name)
        if rule is one_each and value is not None and (not isinstance(value, list) or len(value) < layers):
            raise Refusal(
                f"config.json's {name} is {_short(value)}, but there are {layers} layers: give it one entry a layer"
            )


def _short(value: object, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
