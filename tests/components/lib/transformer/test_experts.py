"""The contract of every family that can lose experts, on a tiny random model of each, and the rules for names and configs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from components.lib.errors import Refusal
from components.lib.transformer.channels import channels_to_remove, check_channels, cut_widths
from components.lib.transformer.checkpoint import PrunableCheckpoint, load_model
from components.lib.transformer.experts import Experts, experts_of, kept_experts, without_expert
from components.lib.transformer.export import Narrowing, verify_cut
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.gates import skipped
from components.lib.transformer.narrow import mixtures, narrowed
from components.lib.transformer.selection import Channels
from components.lib.transformer.surgery import cut_checkpoint
from tests.components.lib.transformer.zoo import MODERN, SPECIMENS, Specimen, logits, release

LAYERS = 6
REMOVED = (0, 4)
"""The layers that go with the experts; the specimens are dense in some layers and sparse in others."""

MIXTURES = [
    specimen
    for specimen in (*SPECIMENS, *MODERN)
    if FAMILIES[specimen.model_type].experts and specimen.settings.get("num_local_experts") != 0
]


def draw_experts(model: PreTrainedModel, count: int = 2, without: tuple[int, ...] = ()) -> Channels:
    """Draw experts to remove, others in every layer that has some."""
    draw = random.Random(0)
    experts = experts_of(FAMILIES[model.config.model_type], model.config.to_dict()).count
    sparse = mixtures(model)
    drawn = [tuple(sorted(draw.sample(range(experts), count))) if layer in sparse else () for layer in range(LAYERS)]
    return Channels(experts=tuple(() if layer in without else row for layer, row in enumerate(drawn)))


@pytest.fixture(scope="module", params=MIXTURES, ids=str)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    return request.param


def test_gates_of_zero_are_the_cut(source: Path, dense: PreTrainedModel, tmp_path: Path) -> None:
    """Bit for bit, with layers too; the cut loads plainly, with nothing missing or left over, and generates with its cache as without."""
    channels = draw_experts(dense, without=REMOVED)
    with skipped(dense, REMOVED):
        plain = logits(dense)
        with narrowed(dense, channels):
            expected = logits(dense)
        assert torch.equal(logits(dense), plain)
    assert (plain - expected).abs().max() > 0.01
    cut_checkpoint(source, tmp_path, REMOVED, channels)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(logits(model.eval()), expected)
    verification = verify_cut(source, tmp_path, REMOVED, channels)
    assert verification.channels["experts"] == Narrowing(4, 2, 2)


def test_a_token_is_routed_to_as_many_as_stay(specimen: Specimen, tmp_path: Path) -> None:
    """To 3 of 4 before, and to 2 of 2 after the cut; Phi's router knows two alone."""
    chosen = next((name for name in ("moe_k", "moe_topk") if name in specimen.settings), "num_experts_per_tok")
    three = replace(specimen, settings=specimen.settings | {chosen: 2 if specimen.name == "phimoe" else 3})
    model = three.model(LAYERS)
    source, channels = release(model, tmp_path / "source"), draw_experts(model)
    with narrowed(model, channels):
        expected = logits(model)
    cut_checkpoint(source, tmp_path / "cut", channels=channels)
    cut = load_model(tmp_path / "cut")
    assert experts_of(FAMILIES[specimen.model_type], cut.config.to_dict()) == Experts(2, 2)
    assert torch.equal(logits(cut), expected)


def test_a_gate_blends_the_two_routings(dense: PreTrainedModel) -> None:
    """In one layer alone, the experts give g · (their sum over all) + (1 − g) · (their sum over those that stay)."""
    channels = draw_experts(dense)
    layer, mixture = next(iter(mixtures(dense).items()))
    alone = Channels(experts=tuple(row if at == layer else () for at, row in enumerate(channels.experts)))
    seen: list[torch.Tensor] = []
    handle = mixture.experts.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    try:
        for gate in (1.0, 0.0, 0.25):
            with narrowed(dense, alone, gate):
                logits(dense)
    finally:
        handle.remove()
    full, cut, blended = seen
    assert torch.allclose(blended, 0.25 * full + 0.75 * cut, rtol=1e-4, atol=1e-5)


def test_names_and_rows_of_the_experts_that_stay() -> None:
    kept = [without_expert(f"model.layers.0.mlp.experts.{number}.up_proj.weight", (0, 2)) for number in range(4)]
    assert kept == [
        None,
        "model.layers.0.mlp.experts.0.up_proj.weight",
        None,
        "model.layers.0.mlp.experts.1.up_proj.weight",
    ]
    assert without_expert("model.layers.0.mlp.shared_experts.up_proj.weight", (0,)) is not None
    assert kept_experts(4, "model.layers.0.mlp.gate.weight", (4, 32), (0, 2)) == [[1, 3], None]
    assert kept_experts(4, "model.layers.0.mlp.moe_statics.e_score_correction_bias", (1, 4), (0, 2)) == [None, [1, 3]]
    assert kept_experts(4, "model.layers.0.mlp.experts.gate_up_proj", (4, 32, 96), (1,)) == [[0, 2, 3], None, None]
    for other in ("mlp.shared_expert_gate.weight", "mlp.experts.0.w1.weight", "self_attn.gate_proj.weight"):
        assert kept_experts(4, f"model.layers.0.{other}", (4, 32), (1,)) == [None, None]


def test_a_router_of_another_size_is_refused() -> None:
    with pytest.raises(
        Refusal,
        match=r"the tensor model.layers.0.mlp.gate.weight has the shape \(8, 32\), but the config states 4 experts",
    ):
        kept_experts(4, "model.layers.0.mlp.gate.weight", (8, 32), (1,))


def test_groups_keep_as_many_experts_each_and_two_at_least() -> None:
    """DeepSeek V3: 8 of 256 experts a token, out of 4 of 8 groups."""
    experts = Experts(256, 8, groups=8, chosen_groups=4)
    assert list(experts.possible()) == list(range(16, 256, 8))
    assert (experts.chosen_of(192), experts.chosen_of(16)) == (8, 8)
    assert Experts(8, 4).chosen_of(3) == 3
    assert list(Experts(4, 2).possible()) == [2, 3]


def test_the_config_states_both_numbers_in_every_name_that_it_has() -> None:
    config = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 6, "hidden_size": 32}
    cut = cut_widths(config, FAMILIES["qwen3_moe"], Channels(experts=((0, 1, 2, 3),)))
    assert cut == {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 4, "hidden_size": 32}


@pytest.mark.parametrize(
    ("model_type", "config", "ratios", "said"),
    [
        ("llama", {}, {"experts": 0.5}, "from Llama 2 and 3, which has no experts"),
        ("llama4_text", {}, {"experts": 0.5}, "from Llama 4 (text), which gives every expert every token"),
        ("jetmoe", {}, {"experts": 0.5}, "from JetMoE, which routes its attention too"),
        ("hunyuan_v1_moe", {}, {"experts": 0.5}, "which may have another number of experts in every layer"),
        ("mixtral", {}, {"experts": 0.5}, "config.json states no number of experts"),
        (
            "mixtral",
            {"num_local_experts": 0, "num_experts_per_tok": 2},
            {"experts": 0.5},
            "config.json states {'num_local_experts': 0}",
        ),
        (
            "mixtral",
            {"num_local_experts": 8, "num_experts": 4, "num_experts_per_tok": 2},
            {"experts": 0.5},
            "write one (num_experts",
        ),
        (
            "mixtral",
            {"num_local_experts": 2, "num_experts_per_tok": 2},
            {"experts": 0.5},
            "of the 2 channels of the axis experts no number near 50% can go (possible parts are none): set methods.dress.ratio to one of them",
        ),
        (
            "mixtral",
            {"num_local_experts": 8, "num_experts_per_tok": 2},
            {"experts": 0.5, "ffn": 0.5},
            "name experts alone",
        ),
        ("mixtral", {}, {"ffn": 0.5}, "Mixtral is a mixture of experts, from which"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(model_type: str, config: dict, ratios: dict, said: str) -> None:
    with pytest.raises(Refusal) as refusal:
        channels_to_remove(FAMILIES[model_type], config, ratios, None)
    assert said in str(refusal.value)


def test_a_checkpoint_is_checked_by_its_headers(tmp_path: Path) -> None:
    specimen = next(specimen for specimen in MIXTURES if specimen.name == "mixtral")
    checkpoint = PrunableCheckpoint.open(release(specimen.model(2), tmp_path))
    check_channels(checkpoint, {"experts": 0.5}, None)
    assert checkpoint.widths is not None
    assert checkpoint.widths.of("experts") == 4
    checkpoint.config["num_local_experts"] = 8
    with pytest.raises(Refusal, match="but the config states 8 experts"):
        check_channels(checkpoint, {"experts": 0.5}, None)


def test_groups_of_a_router_are_cut_alike(tmp_path: Path) -> None:
    """Two of four groups of three experts are chosen by the sum of their two best: one of each goes, and the rest is the gated model."""
    settings = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    deepseek = next(specimen for specimen in MIXTURES if specimen.name == "deepseek_v3")
    grouped = replace(deepseek, settings=deepseek.settings | settings)
    source = release(grouped.model(3), tmp_path / "source")
    channels = Channels(experts=((), (), (0, 5, 7, 9)))
    with narrowed(dense := load_model(source), channels):
        expected = logits(dense)
    cut_checkpoint(source, tmp_path / "cut", channels=channels)
    assert torch.equal(logits(load_model(tmp_path / "cut")), expected)
