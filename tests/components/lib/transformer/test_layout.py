"""The layouts say of every tensor of their families which channels it holds."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from components.lib.errors import Refusal
from components.lib.transformer.channels import kept_rows, layout_of
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.gates import watched
from components.lib.transformer.layout import LLAMA, Layout, Part, Widths, axis_of
from tests.components.lib.transformer.zoo import MODERN, SPECIMENS, Specimen, logits

DENSE = [model_type for model_type, family in FAMILIES.items() if family.layout]
WIDTHS = Widths(hidden=32, ffn=48, heads=4, groups=2, head=8)


def layout(model_type: str) -> Layout:
    return layout_of(FAMILIES[model_type])


def shallow(model_type: str, **settings: object) -> PreTrainedModel:
    """A family's default model, of one layer and without numbers: all it has is shapes."""
    config = CONFIG_MAPPING[model_type](**{FAMILIES[model_type].count: 1, "pad_token_id": None}, **settings)
    # Some classes leave a width open that every release states.
    if getattr(config, "num_key_value_heads", 1) is None:
        config.num_key_value_heads = config.num_attention_heads
    if getattr(config, "head_dim", 1) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", DENSE)
def test_every_tensor_has_the_shape_that_the_layout_gives_it(model_type: str) -> None:
    """In the default shape of the transformers class, which is a released one."""
    model = shallow(model_type)
    widths = layout(model_type).widths(model.config.to_dict())
    for name, tensor in model.state_dict().items():
        kept = kept_rows(layout(model_type), widths, name, tensor.shape, {"hidden": (0,), "ffn": (0,), "heads": (0,)})
        assert len(kept) == tensor.ndim


@pytest.mark.parametrize("model_type", DENSE)
def test_every_axis_is_in_every_block(model_type: str) -> None:
    model = shallow(model_type)
    blocks = FAMILIES[model_type].blocks
    axes = {
        axis_of(segment)
        for name in model.state_dict()
        if name.startswith(f"{blocks}.0.")
        for dimension in layout(model_type).dimensions(name)
        for segment in dimension
    }
    assert axes >= {"hidden", "ffn", "heads"}


@pytest.mark.parametrize(
    "specimen", [specimen for specimen in (*SPECIMENS, *MODERN) if specimen.model_type in DENSE], ids=str
)
@torch.no_grad()
def test_a_branch_is_linear_in_its_last_projection_unless_a_norm_stands_behind_it(specimen: Specimen) -> None:
    model = specimen.model()
    rows = layout(specimen.model_type)
    writers = [module for name, module in model.named_modules() if rows.segments(name) == [["hidden"], ["ffn"]]]
    written = [parameter for writer in writers for parameter in writer.parameters()]
    found = []
    for factor in (2.0, 0.5, 0.0):  # of the weights as they then are: doubled, as they were, none
        for parameter in written:
            parameter *= factor
        with watched(model, [0]) as seen:
            logits(model)
            found.append(seen[0][1])
    twice, once, none = found
    linear = torch.allclose(twice - none, 2 * (once - none), atol=1e-4)
    assert linear != rows.norms_after(model.config.to_dict())


class TestWidths:
    def test_count_the_channels_of_an_axis(self) -> None:
        assert [WIDTHS.of(axis) for axis in ("hidden", "ffn", "heads")] == [32, 48, 2]

    def test_give_a_group_its_query_heads(self) -> None:
        """Two query heads of 8 rows share a key head; GPT-NeoX keeps query, key and value of a head together."""
        assert {segment: WIDTHS.unit(segment) for segment in ("query", "key", "qkv", "ffn")} == {
            "query": 16,
            "key": 8,
            "qkv": 32,
            "ffn": 1,
        }

    def test_give_a_segment_its_size(self) -> None:
        assert [WIDTHS.size(segment) for segment in ("hidden", "ffn", "query", "key", "any")] == [32, 48, 32, 16, 0]

    def test_are_read_from_the_config(self) -> None:
        config = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
        assert LLAMA.widths(config) == Widths(hidden=32, ffn=48, heads=4, groups=2, head=16)

    @pytest.mark.parametrize("absent", [{}, {"num_key_value_heads": None, "head_dim": None}])
    def test_have_the_class_s_defaults_where_the_config_has_none(self, absent: dict[str, None]) -> None:
        config = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4} | absent
        assert LLAMA.widths(config) == Widths(hidden=32, ffn=48, heads=4, groups=4, head=8)

    def test_of_gpt2_have_four_times_the_hidden_width_where_it_says_nothing(self) -> None:
        assert layout("gpt2").widths({"n_embd": 32, "n_head": 4, "n_inner": None}).ffn == 128


class TestDimensions:
    def test_are_a_weight_s_output_and_input(self) -> None:
        assert LLAMA.dimensions("model.layers.3.self_attn.o_proj.weight") == [["hidden"], ["query"]]

    def test_of_a_bias_are_the_output_s(self) -> None:
        assert LLAMA.dimensions("model.layers.3.self_attn.k_proj.bias") == [["key"]]

    def test_of_fused_projections_have_several_segments(self) -> None:
        assert layout("phi3").dimensions("model.layers.0.self_attn.qkv_proj.weight")[0] == ["query", "key", "key"]
        assert layout("phi3").dimensions("model.layers.0.mlp.gate_up_proj.weight")[0] == ["ffn", "ffn"]

    def test_of_gpt2_s_blocks_are_stored_input_first_and_its_embeddings_are_not(self) -> None:
        gpt2 = layout("gpt2")
        assert gpt2.dimensions("transformer.h.0.mlp.c_fc.weight") == [["hidden"], ["ffn"]]
        assert gpt2.dimensions("transformer.h.0.mlp.c_fc.bias") == [["ffn"]]
        assert gpt2.dimensions("transformer.wte.weight") == [["any"], ["hidden"]]

    def test_of_one_name_differ_by_the_module_above_it(self) -> None:
        gpt2 = layout("gpt2")
        assert gpt2.dimensions("h.0.attn.c_proj.weight") == [["query"], ["hidden"]]
        assert gpt2.dimensions("h.0.mlp.c_proj.weight") == [["ffn"], ["hidden"]]

    def test_are_those_of_the_longest_end_of_the_path_that_is_known(self) -> None:
        rows = Layout({"dense": "ffn hidden", "attention.dense": "hidden query"})
        assert rows.segments("layers.0.attention.dense") == [["hidden"], ["query"]]
        assert rows.segments("layers.0.mlp.dense") == [["ffn"], ["hidden"]]
        assert rows.segments("layers.0.mlp.condense") is None

    def test_of_a_norm_of_heads_are_no_norm_s_of_the_stream(self) -> None:
        assert layout("qwen3").dimensions("model.layers.0.self_attn.q_norm.weight") == [["any"]]
        assert layout("olmo2").dimensions("model.layers.0.self_attn.q_norm.weight") == [["query"]]
        assert layout("qwen3").dimensions("model.norm.weight") == [["hidden"]]

    def test_of_a_tensor_that_is_not_known_are_refused(self) -> None:
        with pytest.raises(Refusal, match=r"does not say which channels the tensor model\.layers\.0\.gate\.weight"):
            LLAMA.dimensions("model.layers.0.gate.weight")


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.layers.0.self_attn.v_proj.weight", "attention"),
        ("model.layers.0.self_attn.o_proj.weight", "attention"),
        ("model.layers.0.mlp.down_proj.weight", "ffn"),
        ("model.layers.0.input_layernorm.weight", "rest"),
        ("model.embed_tokens.weight", "rest"),
        ("lm_head.weight", "rest"),
    ],
)
def test_a_tensor_is_of_the_part_that_the_paper_counts_it_to(tensor: str, part: Part) -> None:
    assert LLAMA.part(tensor) == part
