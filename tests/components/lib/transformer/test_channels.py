"""How many channels go, which rows those are, what the config then says, and what is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from components.lib.errors import Refusal
from components.lib.transformer.channels import (
    channels_to_remove,
    check_channels,
    cut_widths,
    kept_indices,
    kept_rows,
    layout_of,
)
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.layout import LLAMA, Axis, Widths
from components.lib.transformer.selection import AXES, NO_CHANNELS, Channels
from tests.components.lib.transformer.zoo import (
    FFN_ONLY,
    HEAD_NORMED,
    MODERN,
    NARROWABLE,
    PROJECTED,
    SPECIMENS,
    Specimen,
    release,
)

BY_NAME = {specimen.name: specimen for specimen in (*SPECIMENS, *NARROWABLE)}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
LLAMA_8B = LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
GPT2 = {"n_embd": 768, "n_head": 12, "n_inner": None}


def removed(
    model_type: str, config: dict[str, Any], ratios: dict[Axis, float], multiple: int | None = None
) -> dict[Axis, int]:
    return channels_to_remove(FAMILIES[model_type], config, ratios, multiple)


def refusal(model_type: str, config: dict[str, Any], ratios: dict[Axis, float], multiple: int | None = None) -> str:
    with pytest.raises(Refusal) as refused:
        removed(model_type, config, ratios, multiple)
    return str(refused.value)


class TestTheNumberThatGoes:
    def test_is_the_ratio_s(self) -> None:
        ratios: dict[Axis, float] = {"hidden": 0.25, "ffn": 0.5, "heads": 0.25}
        assert removed("llama", LLAMA_8B, ratios) == {"hidden": 1024, "ffn": 7168, "heads": 2}

    def test_is_of_the_axes_that_are_asked_for_alone(self) -> None:
        assert removed("llama", LLAMA_8B, {"ffn": 0.5}) == {"ffn": 7168}

    @pytest.mark.parametrize(("multiple", "kept"), [(None, 7704), (8, 7704), (64, 7680), (256, 7680), (1, 7706)])
    def test_leaves_a_multiple(self, multiple: int | None, kept: int) -> None:
        assert 11008 - removed("mistral", LLAMA_7B, {"ffn": 0.3}, multiple)["ffn"] == kept

    def test_leaves_whole_groups(self) -> None:
        assert removed("mistral", LLAMA_8B, {"heads": 0.3}) == {"heads": 2}

    @pytest.mark.parametrize("asked", [("hidden",), ("heads",), ("hidden", "heads")])
    @pytest.mark.parametrize("model_type", ["opt", "phi", "gpt2", "gpt_neox", "stablelm"])
    def test_is_of_hidden_and_heads_together_where_no_width_of_a_head_is_stated(
        self, model_type: str, asked: tuple[Axis, ...]
    ) -> None:
        """12 heads of 64: at 30 % 4 heads go, and 256 of the hidden width with them."""
        config = GPT2 if model_type == "gpt2" else LLAMA_7B | {"hidden_size": 768, "num_attention_heads": 12}
        config |= {"num_key_value_heads": 12}
        assert removed(model_type, config, dict.fromkeys(asked, 0.3)) == {"hidden": 256, "heads": 4}

    def test_leaves_a_hidden_width_that_the_heads_divide_where_the_class_wants_that(self) -> None:
        """22 of 32 heads would stay; below that 16 is the first number that divides 4096."""
        assert "can go" in refusal("llama", LLAMA_7B, {"heads": 0.3})
        assert removed("llama", LLAMA_7B, {"heads": 0.45}) == {"heads": 16}
        assert removed("mistral", LLAMA_7B, {"heads": 0.3}) == {"heads": 10}

    def test_lets_the_hidden_width_follow_the_heads_where_both_go(self) -> None:
        gone = removed("llama", LLAMA_7B, {"heads": 0.3, "hidden": 0.3})
        assert gone["heads"] == 10
        assert (4096 - gone["hidden"]) % (32 - 10) == (4096 - gone["hidden"]) % 8 == 0
        assert gone["hidden"] / 4096 == pytest.approx(0.3, abs=0.02)

    @pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.5, 0.6])
    @pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.layout])
    def test_is_near_the_ratio_in_every_family_s_default_shape(self, model_type: str, ratio: float) -> None:
        config = CONFIG_MAPPING[model_type]().to_dict()
        widths = layout_of(FAMILIES[model_type]).widths(config)
        gone = removed(model_type, config, {"hidden": ratio, "ffn": ratio})
        assert {"hidden", "ffn"} <= set(gone)
        for axis, count in gone.items():
            assert count / widths.of(axis) == pytest.approx(ratio, abs=0.05)


class TestARefusal:
    def test_of_a_mixture_of_experts_names_the_method_that_can(self) -> None:
        for model_type in ("mixtral", "qwen3_moe"):
            assert "is a mixture of experts" in refusal(model_type, {}, {"ffn": 0.5})
            assert "use the method trsp" in refusal(model_type, {}, {"ffn": 0.5})

    def test_of_a_family_without_a_layout_does_not_call_it_a_mixture_of_experts(self) -> None:
        with pytest.raises(
            Refusal, match=r"the row 'llama' of .* has no layout, so the channels of Llama 2 and 3 are"
        ) as refused:
            layout_of(replace(FAMILIES["llama"], layout=None))
        assert "mixture" not in str(refused.value)

    def test_of_two_ratios_for_what_shrinks_together_names_both(self) -> None:
        said = refusal("gpt2", GPT2, {"hidden": 0.25, "heads": 0.5})
        assert said.startswith(
            "methods.dress.ratio is 0.25 for hidden and 0.5 for heads, but GPT-2 states no width of a head"
        )

    def test_of_a_ratio_that_no_width_is_near_names_those_that_are(self) -> None:
        said = refusal("mistral", LLAMA_7B | {"hidden_size": 96}, {"hidden": 0.5}, multiple=32)
        assert said.startswith("of the 96 channels of the axis hidden no number near 50% can go")
        assert "possible parts are 0.33, 0.67" in said

    def test_of_one_group_says_that_there_is_no_way(self) -> None:
        assert "possible parts are none" in refusal("mistral", LLAMA_7B | {"num_key_value_heads": 1}, {"heads": 0.5})

    @pytest.mark.parametrize(
        ("name", "tensor"), [(PROJECTED, "embed_tokens|lm_head|project_"), (HEAD_NORMED, r"layernorm\.norms")]
    )
    @pytest.mark.parametrize("axes", [("hidden",), ("heads",), ("ffn", "heads")])
    def test_of_a_checkpoint_names_the_tensor_that_the_layout_does_not_fit(
        self, name: str, tensor: str, axes: tuple[Axis, ...], tmp_path: Path
    ) -> None:
        checkpoint = PrunableCheckpoint.open(release(BY_NAME[name].model(2), tmp_path))
        with pytest.raises(Refusal, match=f"the tensor [a-z0-9_.]*({tensor}).* remove layers instead"):
            check_channels(checkpoint, dict.fromkeys(axes, 0.5), None)


@pytest.mark.parametrize("specimen", NARROWABLE, ids=str)
def test_a_checkpoint_whose_channels_can_be_cut_passes(specimen: Specimen, tmp_path: Path) -> None:
    checkpoint = PrunableCheckpoint.open(release(specimen.model(1), tmp_path))
    check_channels(checkpoint, dict.fromkeys(AXES, 0.5), None)


@pytest.mark.parametrize("specimen", FFN_ONLY, ids=str)
def test_a_checkpoint_with_tensors_beside_the_layout_can_lose_ffn_channels(specimen: Specimen, tmp_path: Path) -> None:
    checkpoint = PrunableCheckpoint.open(release(specimen.model(1), tmp_path))
    check_channels(checkpoint, {"ffn": 0.5}, None)


SMALL = Widths(hidden=4, ffn=3, heads=4, groups=2, head=2)
GONE: dict[Axis, tuple[int, ...]] = {"hidden": (1,), "ffn": (0, 2), "heads": (0,)}


class TestTheRowsThatStay:
    @pytest.mark.parametrize(
        ("segments", "rows"),
        [
            (["hidden"], [0, 2, 3]),
            (["ffn"], [1]),
            (["ffn", "ffn"], [1, 4]),
            (["key"], [2, 3]),
            (["query"], [4, 5, 6, 7]),
            (["query", "key", "key"], [4, 5, 6, 7, 10, 11, 14, 15]),
            (["qkv"], [8, 9, 10, 11, 12, 13, 14, 15]),
            (["any"], None),
        ],
    )
    def test_are_those_of_the_channels_that_stay(self, segments: list[str], rows: list[int] | None) -> None:
        assert kept_indices(SMALL, segments, GONE) == rows

    def test_are_all_where_none_of_the_axis_go(self) -> None:
        assert kept_indices(SMALL, ["hidden"], {"hidden": (), "ffn": (0,)}) is None

    def test_are_told_for_each_dimension(self) -> None:
        name = "model.layers.0.self_attn.o_proj.weight"
        assert kept_rows(LLAMA, SMALL, name, (4, 8), GONE) == [[0, 2, 3], [4, 5, 6, 7]]

    @pytest.mark.parametrize("shape", [(2,), (2, 2)])
    def test_of_a_tensor_that_is_not_known_are_all_if_it_is_too_small_for_the_axis(
        self, shape: tuple[int, ...]
    ) -> None:
        assert kept_rows(LLAMA, SMALL, "model.layers.0.other.weight", shape, {"ffn": (0,)}) == [None] * len(shape)

    @pytest.mark.parametrize(("shape", "axis"), [((3,), "ffn"), ((2, 6), "ffn"), ((2,), "hidden"), ((2,), "heads")])
    def test_of_a_tensor_that_may_hold_the_axis_and_is_not_known_are_refused(
        self, shape: tuple[int, ...], axis: Axis
    ) -> None:
        with pytest.raises(
            Refusal, match=r"does not say which channels the tensor model\.layers\.0\.other\.weight holds"
        ):
            kept_rows(LLAMA, SMALL, "model.layers.0.other.weight", shape, {axis: (0,)})

    @pytest.mark.parametrize("shape", [(4, 9), (5, 8), (4,)])
    def test_of_a_tensor_of_another_shape_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(Refusal, match=r"o_proj\.weight has the shape .*, but the config's widths give \(4, 8\)"):
            kept_rows(LLAMA, SMALL, "model.layers.0.self_attn.o_proj.weight", shape, GONE)


class TestTheConfig:
    channels = Channels(hidden=(0, 1), ffn=((0,), (1,)), heads=((0,), (1,)))

    def cut(self, model_type: str, **config: Any) -> dict[str, Any]:
        return cut_widths(config, FAMILIES[model_type], self.channels)

    def test_states_the_widths_that_stay_and_the_rest_as_it_was(self) -> None:
        """A head's width too, which hidden / heads no longer gives."""
        cut = self.cut(
            "llama",
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=1e4,
        )
        assert cut == {
            "hidden_size": 30,
            "intermediate_size": 47,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_theta": 1e4,
        }

    def test_keeps_an_embedding_that_is_narrower_than_the_stream(self) -> None:
        config = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_attention_heads": 16}
        ffn = Channels(ffn=((0,), (1,)))
        assert cut_widths(config, FAMILIES["opt"], ffn) == config | {"ffn_dim": 47}

    def test_of_opt_states_the_width_of_its_embedding_too(self) -> None:
        cut = self.cut("opt", hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_attention_heads=16)
        assert cut == {"hidden_size": 30, "word_embed_proj_dim": 30, "ffn_dim": 47, "num_attention_heads": 15}

    def test_of_gpt2_states_the_intermediate_width_that_was_four_times_the_hidden_one(self) -> None:
        assert self.cut("gpt2", n_embd=32, n_head=16, n_inner=None) == {"n_embd": 30, "n_head": 15, "n_inner": 127}

    def test_is_as_it_was_where_no_channels_go(self) -> None:
        assert cut_widths({"a_field": 1}, FAMILIES["mixtral"], NO_CHANNELS) == {"a_field": 1}


MLPS = [
    specimen for specimen in (*SPECIMENS, *MODERN) if FAMILIES[specimen.model_type].layout or specimen.name == "gemma4"
]


@pytest.mark.parametrize("specimen", MLPS, ids=str)
def test_no_family_loads_with_another_intermediate_width_in_one_layer(specimen: Specimen) -> None:
    """transformers has `per_layer_config` for it, which its classes refuse or do not read. If one does, its layers can have widths of their own."""
    layout = FAMILIES[specimen.model_type].layout or LLAMA
    with torch.device("meta"):
        config = specimen.model(6).config
        config.per_layer_config = {"1": {layout.ffn: 20}}
        try:
            model = AutoModelForCausalLM.from_config(config)
        except AmbiguousGlobalPerLayerAttributeError:
            return
    assert not any(20 in tensor.shape for tensor in model.parameters())
