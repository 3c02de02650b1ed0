"""DReSS's axis of experts: as many of every mixture as asked, those that do the least, by REAP's saliency (arXiv 2510.13999)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from components.lib.methods.dress import Dress
from components.lib.methods.dress.experts import _saliency
from components.lib.recipe.training import Regularize
from components.lib.training.journal import Silent
from components.lib.transformer.narrow import mixtures, router_of
from components.lib.transformer.selection import NOTHING, Selection
from tests.components.lib.training.tiny import counting, same, weights
from tests.components.lib.transformer.zoo import MODERN, SPECIMENS, Specimen

WAYS = ("activation", "magnitude", "random")
BY_NAME = {specimen.name: specimen for specimen in (*SPECIMENS, *MODERN)}
LAYERS = 4


def choose(
    model: PreTrainedModel, channels: str = "activation", before: Selection = NOTHING, **fields: Any
) -> Selection:
    dress = Dress(**{"channels": channels, "axes": ("experts",), "ratio": 0.5, "batch_size": 2} | fields)
    return dress.choose(model, counting(), before, journal=Silent(), out=None)


def of_groups() -> Specimen:
    """A DeepSeek V3 with 12 experts in 4 groups, and a first layer without experts."""
    settings = {
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
    }
    return Specimen("grouped", "deepseek_v3", BY_NAME["deepseek_v3"].settings | settings)


@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    def test_chooses_as_many_of_every_mixture_and_leaves_the_model_as_it_was(self, way: str) -> None:
        model = BY_NAME["qwen3_moe"].model(LAYERS)  # experts in layer 1 alone
        before = weights(model)
        selection = choose(model, way)
        assert [len(set(row)) for row in selection.channels.experts] == [0, 2, 0, 0]
        assert (selection.method, selection.channels.axes, selection.channels.narrow) == ("dress", ("experts",), False)
        assert same(weights(model), before)
        assert not [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]
        assert choose(model, way) == selection

    def test_chooses_none_of_a_removed_layer(self, way: str) -> None:
        selection = choose(BY_NAME["mixtral"].model(LAYERS), way, Selection.of_layers("trsp", [2]))
        assert [len(row) for row in selection.channels.experts] == [2, 2, 0, 2]
        assert (selection.method, selection.removed) == ("trsp+dress", (2,))

    def test_chooses_as_many_of_each_group_of_the_router(self, way: str) -> None:
        selection = choose(of_groups().model(2), way, ratio=1 / 3)
        nothing, chosen = selection.channels.experts
        assert nothing == ()
        assert [expert // 3 for expert in chosen] == [0, 1, 2, 3]


@torch.no_grad()
def test_saliency_is_the_mean_of_router_weight_times_norm_over_the_routed_tokens() -> None:
    """By hand, from what the router and the experts of each layer are given, one expert and one token at a time."""
    model, windows = BY_NAME["mixtral"].model(2), counting()[:3]
    found = _saliency(Dress(axes=("experts",), ratio=0.5, batch_size=2), model, windows, NOTHING, Silent())
    for layer, mixture in mixtures(model).items():
        seen: list[tuple[Any, ...]] = []
        handle = router_of(mixture).register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append((inputs[0], *output[1:]))
        )
        model(input_ids=windows.long(), use_cache=False)
        handle.remove()
        x, weight, chosen = seen[0]
        products: list[list[float]] = [[] for _ in range(4)]
        for token in range(len(x)):
            for place, expert in enumerate(chosen[token].tolist()):
                gate, up = (mixture.experts.gate_up_proj[expert] @ x[token]).chunk(2)
                output = mixture.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                products[expert].append(weight[token, place].item() * output.norm().item())
        means = torch.tensor([sum(row) / len(row) if row else 0.0 for row in products])
        assert torch.allclose(found[layer].float(), means, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "granitemoe", "glm4_moe", "phimoe", "qwen3_5_moe"])
def test_finds_the_expert_that_says_nothing(name: str) -> None:
    """Whatever the family's experts look like: the one with a last projection of 0 goes first."""
    model = BY_NAME[name].model(LAYERS)
    for mixture in mixtures(model).values():
        for weight in mixture.experts.parameters():
            weight[2] *= 0 if weight.shape[0] == 4 else 1
    selection = choose(model, ratio=0.25)
    assert [row for row in selection.channels.experts if row] == [(2,)] * len(mixtures(model))


def test_an_expert_to_which_nothing_is_routed_is_removed_first() -> None:
    model = BY_NAME["gpt_oss"].model(LAYERS)
    for mixture in mixtures(model).values():
        router_of(mixture).bias.data[1] = -1e4
    assert choose(model, ratio=0.25).channels.experts == ((1,),) * LAYERS


@pytest.mark.parametrize("way", ["wanda", "fluctuation"])
def test_a_score_of_channels_alone_is_refused(way: str) -> None:
    with pytest.raises(ValueError, match=f"channels {way} scores no experts: set it to random, magnitude, activation"):
        Dress(axes=("experts",), ratio=0.5, channels=way)


def test_the_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="a router chooses an expert whatever its weights are: set it to anneal"):
        Dress(axes=("experts",), ratio=0.5).check_training(Regularize(schedule="penalty"))


def test_the_report_names_the_choice() -> None:
    (sentence,) = Dress(axes=("experts",), ratio=0.5).parts(NOTHING, None)
    assert "as REAP has it" in str(sentence)
