"""The rules that keep a config's per-layer fields true when layers go, one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from components.lib.errors import Refusal
from components.lib.transformer.families import FAMILIES, cut_config, family_of, kept_layers
from components.lib.transformer.family import (
    Rule,
    counted_from_one,
    first_sparse,
    keyed,
    last_sparse,
    letters,
    no_heads,
    one_each_if_listed,
    repeated,
    unchanged,
)
from components.lib.transformer.surgery import written_out

KEPT = [1, 2, 5]
"""Of six layers those that stay."""


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        (
            keyed,
            {"01": {"head_dim": 512}, "03": {"head_dim": 256}, "05": {"head_dim": 64}},
            {"0": {"head_dim": 512}, "2": {"head_dim": 64}},
        ),
        (letters, "M-M*-E", "-ME"),
        (one_each_if_listed, 8, 8),
        (one_each_if_listed, [1, 2, 3, 4, 5, 6], [2, 3, 6]),
        (
            counted_from_one,
            {"full_attn_layers": [2, 4], "kda_layers": [1, 3, 5, 6], "head_dim": 8},
            {"full_attn_layers": [1], "kda_layers": [2, 3], "head_dim": 8},
        ),
        (repeated, ["recurrent", "recurrent", "attention"], ["recurrent", "attention", "attention"]),
        (first_sparse, 2, 1),
        (first_sparse, 0, 0),
        (last_sparse, 4, 1),
        (last_sparse, -1, -1),
        (no_heads, 1, 0),
        (unchanged, ["full_attention", "moe"], ["full_attention", "moe"]),
    ],
)
def test_a_rule_gives_the_cut_model_s_value(rule: Rule, before: Any, after: Any) -> None:
    assert rule({"field": before}, "field", KEPT) == after


def test_gemma_4_keeps_a_last_layer_of_full_attention() -> None:
    """The methods know it before their work, and choose among the others."""
    gemma, config = FAMILIES["gemma4_text"], {"num_hidden_layers": 3}
    assert gemma.removable(config) == [0, 1]
    with pytest.raises(
        Refusal, match=r"layer 2 of Gemma 4 \(text\) cannot be removed, since the config class makes the last"
    ):
        cut_config(config, gemma, (2,))


def test_a_list_counts_the_layers_of_a_config_without_a_count() -> None:
    nemotron, config = FAMILIES["nemotron_h"], {"layers_block_type": ["moe", "mlp", "full_attention"]}
    assert nemotron.layers(config) == 3
    assert cut_config(config, nemotron, (0,)) == {"layers_block_type": ["mlp", "full_attention"]}
    assert nemotron.layers({"num_hidden_layers": 2, "hybrid_override_pattern": "M*"}) == 2


def test_a_field_of_another_value_than_the_one_that_a_cut_can_keep_is_refused() -> None:
    config = {
        "model_type": "ernie4_5_moe",
        "num_hidden_layers": 4,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
    }
    assert family_of(config | {"moe_layer_interval": 1})
    with pytest.raises(
        Refusal, match=r"moe_layer_interval is 2, which makes every n-th layer sparse.*choose a model in which it is 1"
    ):
        family_of(config | {"moe_layer_interval": 2})


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2, "moe_layer_freq": 1, "num_nextn_predict_layers": 1}),
        ("qwen3_5_text", {"full_attention_interval": 4, "mtp_num_hidden_layers": 1}),
        (
            "cohere2",
            {"layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "sliding_window_pattern": 4},
        ),
        ("minimax_m2", {"attn_type_list": [1, 1, 1, 1], "mtp_transformer_layers": 1}),
        ("mamba", {"n_layer": 4}),
        ("falcon_h1", {"attn_layer_indices": None, "mlp_multipliers": [0.5, 0.25]}),
    ],
)
def test_fields_that_releases_have_and_config_classes_do_not_are_known(model_type: str, fields: dict[str, Any]) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 4} | fields
    cut = cut_config(config, family_of(config), (0,))
    assert family_of(cut).layers(cut) == 3


class TestAPeriod:
    """Jamba's config has a period and an offset alone: attention in layers 1, 4 and 7 of 9, experts in every second."""

    CONFIG = {  # noqa: RUF012
        "model_type": "jamba",
        "num_hidden_layers": 9,
        "num_experts": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }

    def test_is_found_for_every_cut_that_leaves_one(self) -> None:
        config, held = self.CONFIG, []
        for removed in itertools.chain.from_iterable(itertools.combinations(range(9), n) for n in range(1, 9)):
            try:
                cut = cut_config(config, FAMILIES["jamba"], removed)
            except Refusal:
                continue
            held.append(removed)
            for kind in ("attn", "expert"):
                period, offset = cut[f"{kind}_layer_period"], cut[f"{kind}_layer_offset"]
                assert offset < period  # the config class asks for it
                kinds = [old % config[f"{kind}_layer_period"] == config[f"{kind}_layer_offset"] for old in range(9)]
                assert [new % period == offset for new in range(9 - len(removed))] == [
                    kinds[old] for old in kept_layers(9, removed)
                ]
        assert {(8,), (7, 8), (6, 7, 8), (3, 4, 5, 6, 7, 8), (0, 1, 2, 3, 4, 5)} <= set(held)

    def test_is_refused_if_there_is_none(self) -> None:
        with pytest.raises(
            Refusal, match=r"attn_layer_period makes every 3th .*remove the last layers \(methods.last\)"
        ):
            cut_config(self.CONFIG, FAMILIES["jamba"], (2,))

    def test_of_experts_does_not_count_if_there_is_one_alone(self) -> None:
        dense = self.CONFIG | {"num_experts": 1}
        cut = cut_config(dense, FAMILIES["jamba"], (0, 3, 6))
        assert (cut["attn_layer_period"], cut["attn_layer_offset"], cut["expert_layer_period"]) == (2, 0, 2)


def test_nemotron_h_is_cut_by_its_pattern_and_by_its_list() -> None:
    """Releases write the pattern, transformers writes the list; both are in step after a cut."""
    nemotron = FAMILIES["nemotron_h"]
    config = {"model_type": "nemotron_h", "num_hidden_layers": 4, "hybrid_override_pattern": "M-*E"}
    cut = cut_config(written_out(config, nemotron), nemotron, (1,))
    assert (cut["num_hidden_layers"], cut["hybrid_override_pattern"]) == (3, "M*E")
    assert cut["layers_block_type"] == ["linear_attention", "full_attention", "moe"]


@pytest.mark.parametrize(
    ("config", "tensor", "ignored"),
    [
        ({"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}, "model.layers.4.eh_proj.weight", True),
        ({"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}, "model.layers.5.eh_proj.weight", False),
        ({"model_type": "deepseek_v3"}, "model.layers.4.eh_proj.weight", False),
        ({"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}, "model.layers.3.mlp.gate.weight", False),
        ({"model_type": "qwen3_next"}, "mtp.layers.0.mlp.gate.weight", True),
        ({"model_type": "llama"}, "mtp.layers.0.mlp.gate.weight", False),
    ],
)
def test_heads_for_multi_token_prediction_are_told_by_their_names(
    config: dict[str, Any], tensor: str, ignored: bool
) -> None:
    assert FAMILIES[config["model_type"]].ignores(tensor, config | {"num_hidden_layers": 4}) == ignored
