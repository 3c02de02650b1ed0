"""What the table says of a config, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from components.lib.errors import Refusal
from components.lib.transformer.families import (
    FAMILIES,
    check_attention,
    cut_config,
    family_named,
    family_of,
    kept_layers,
)

LLAMA = {"model_type": "llama", "num_hidden_layers": 4}


def cut(model_type: str, layers: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    return cut_config({"model_type": model_type, **fields}, FAMILIES[model_type], layers)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_a_supported_config_is_known(model_type: str) -> None:
    """The full default config of each family passes, so that a release that writes every field out passes."""
    config = CONFIG_MAPPING[model_type]().to_dict() | dict.fromkeys(FAMILIES[model_type].unsupported)
    assert family_of(config) is FAMILIES[model_type]


def test_lists_with_one_entry_a_layer_lose_the_removed_layers_entries() -> None:
    config = cut("gemma2", (1, 2), num_hidden_layers=4, layer_types=["a", "b", "c", "d"])
    assert config == {"model_type": "gemma2", "num_hidden_layers": 2, "layer_types": ["a", "d"]}


@pytest.mark.parametrize("field", ["layer_types", "layers_block_type"])
def test_a_hybrid_keeps_a_layer_of_attention(field: str) -> None:
    kinds = ["linear_attention", "full_attention", "conv", "full_attention", "moe"]
    with pytest.raises(
        Refusal, match=r"chosen, 1, 3, 4, hold every layer of attention of the model, .*: lower the ratio"
    ):
        check_attention({field: kinds}, (1, 3, 4))
    check_attention({"text_config": {field: kinds}}, (0, 1, 2))
    check_attention({field: ["linear_attention"] * 2}, (0,))  # has none, and generates without
    check_attention({}, (0, 1))


def test_a_count_of_leading_layers_counts_those_that_stay() -> None:
    assert cut("qwen2", (0, 3), num_hidden_layers=4, max_window_layers=2)["max_window_layers"] == 1
    assert cut("qwen2", (0, 3), num_hidden_layers=4, max_window_layers=28)["max_window_layers"] == 2


def test_a_period_goes_once_the_list_is_written_out() -> None:
    config = cut("smollm3", (0,), num_hidden_layers=3, no_rope_layers=[1, 1, 0], no_rope_layer_interval=3)
    assert config == {"model_type": "smollm3", "num_hidden_layers": 2, "no_rope_layers": [1, 0]}


def test_dense_layers_of_a_sparse_model_are_named_one_by_one() -> None:
    """With step 2 layers 1, 3 and 5 are sparse, and 3 is listed as dense."""
    config = cut("qwen3_moe", (0,), num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [1, 2, 3])


def test_gpt2_counts_its_layers_by_another_name() -> None:
    assert cut("gpt2", (0,), n_layer=3) == {"model_type": "gpt2", "n_layer": 2}


@pytest.mark.parametrize(
    ("removed", "said"), [([4], r"hold \[4\], but the model has layers 0 to 3"), ([0, 1, 2, 3], "all 4 layers")]
)
def test_impossible_cuts_are_refused(removed: list[int], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        kept_layers(4, removed)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "reformer"}, "'reformer' is not supported, since it has recurrent blocks"),
        ({"model_type": "next-year"}, "'next-year' is not supported: supported are llama, .*docs/families.md"),
        ({"model_type": None}, "None is not supported"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types .* as many entries as there are layers"),
        ({"next_years_field": [0.5, 0.5, 0.5, 0.5]}, "next_years_field .* as many entries as there are layers"),
        ({"attention": {"widths": [8, 8, 4, 4]}}, "attention.widths .* as many entries"),
        ({"dense_at": [0, 3]}, "dense_at .* may be indices"),
        ({"special": {"0": 1, "2": 5}}, "special .* is keyed by what may be indices"),
        ({"moe_layer_start": 1}, "moe_layer_start .* speaks of layers by its name"),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern .* by its name"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"quantization_config .* quantised \(gptq\): prune the full-precision release,",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}, "_name_or_path": "meta/Model-1.5"},
            r"\(awq\): prune the full-precision release \(its config names meta/Model-1.5\)",
        ),
        (
            {"quantization_config": {"bits": 4}, "_name_or_path": "/tmp/model"},
            "are quantised: prune the full-precision release, and",
        ),
        ({"compression_config": {"quant_method": "fp8"}}, "compression_config"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is an encoder-decoder"),
        ({"model_type": "mllama", "text_config": {}, "vision_config": {}}, "'mllama' wraps a text model"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map .* is not run"),
    ],
)
def test_what_is_not_known_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        family_of(LLAMA | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": [1, 2, 3, 0]},
        {"layer_norm_eps": 1e-5},
        {"per_layer_scale": None},
        {"use_layer_scale": False},
        {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0, 1.0, 1.0, 1.0]}},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
        {"transformers.js_config": {"dtype": "q4"}},
    ],
)
def test_fields_that_only_look_like_layers_pass(fields: dict[str, Any]) -> None:
    assert family_of(LLAMA | fields).model_type == "llama"


def test_code_of_its_own_passes_with_the_flag() -> None:
    assert family_of(LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, remote_code=True)


def test_attention_scaled_by_the_layer_s_index_is_refused() -> None:
    with pytest.raises(Refusal, match="scale_attn_by_inverse_layer_idx"):
        family_of({"model_type": "gpt2", "n_layer": 2, "scale_attn_by_inverse_layer_idx": True})


def test_a_list_shorter_than_the_model_is_refused() -> None:
    with pytest.raises(Refusal, match=r"layer_types .* but there are 4 layers"):
        family_of({"model_type": "qwen3", "num_hidden_layers": 4, "layer_types": ["full_attention"] * 3})


def test_tensors_are_told_apart_by_their_block() -> None:
    opt = family_named("opt")
    for name in ("model.decoder.layers.11.fc1.weight", "decoder.layers.11.fc1.weight"):
        found = opt.block_of(name)
        assert found is not None
        index, start, end = found
        assert (index, name[start:end]) == (11, "11")
    assert opt.block_of("model.decoder.embed_tokens.weight") is None
    assert opt.block_of("vision.model.decoder.layers.1.fc1.weight") is None


def test_refusing_needs_no_torch() -> None:
    code = "import sys, components.lib.transformer.checkpoint; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
