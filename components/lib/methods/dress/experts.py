"""The choice of experts: as many of every mixture, those of the lowest score.

The score `activation` is REAP's saliency (arXiv 2510.13999), of expert e over the tokens X_e of the calibration windows that are routed to it:

    S_e = 1/|X_e| · Σ_{x ∈ X_e} w_e(x) · ‖E_e(x)‖₂

w_e the router's weight and E_e the expert's output; 0 for an expert to which no token is routed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.lib.methods.dress.work import run
from components.lib.training.journal import Journal
from components.lib.transformer.channels import channels_to_remove
from components.lib.transformer.experts import along_experts, experts_of
from components.lib.transformer.gates import blocks, family_in
from components.lib.transformer.narrow import mixtures
from components.lib.transformer.selection import Channels, Selection

if TYPE_CHECKING:
    from components.lib.methods.dress import Dress

Scores = Mapping[int, Tensor]
"""Layer → a score for each expert (experts,). The lowest are removed."""


def choose_experts(
    settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal
) -> Selection:
    """Choose as many experts of every layer that has some as the ratio asks for, and as many of each group; removed layers lose none."""
    config, family = model.config.to_dict(), family_in(model)
    count = channels_to_remove(family, config, settings.ratios, settings.multiple)["experts"]
    groups = experts_of(family, config).groups
    scores = _SCORES[settings.channels](settings, model, windows, before, journal)

    def lowest(layer: int) -> tuple[int, ...]:
        if layer in before.removed or layer not in scores:
            return ()
        grouped = scores[layer].unflatten(0, (groups, -1))  # (groups, experts of a group)
        order = grouped.argsort(dim=-1, stable=True)[:, : count // groups]
        first = torch.arange(groups)[:, None] * grouped.shape[1]
        return tuple(sorted((order.cpu() + first).flatten().tolist()))

    chosen = Channels(experts=tuple(lowest(layer) for layer in range(len(blocks(model)))))
    return before.with_channels(settings.name, chosen)


def _random(settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal) -> Scores:
    """Score experts at random."""
    draw = torch.Generator().manual_seed(settings.seed)
    count = experts_of(family_in(model), model.config.to_dict()).count
    return {layer: torch.rand(count, generator=draw) for layer in mixtures(model)}


@torch.no_grad()
def _magnitude(settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal) -> Scores:
    """Score an expert by ‖W‖² over its matrices."""
    count = experts_of(family_in(model), model.config.to_dict()).count

    def energy(experts: nn.Module) -> Tensor:
        stacked = (
            weight for weight in experts.parameters() if weight.ndim == 3 and along_experts(count, weight.shape) == 0
        )
        return torch.stack([weight.float().square().sum((1, 2)) for weight in stacked]).sum(0)

    return {layer: energy(mixture.get_submodule("experts")) for layer, mixture in mixtures(model).items()}


@torch.no_grad()
def _saliency(settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal) -> Scores:
    """Score an expert by REAP's saliency, with the layers removed so far bypassed."""
    count = experts_of(family_in(model), model.config.to_dict()).count
    found = mixtures(model)
    sums = {layer: torch.zeros(2, count, dtype=torch.float64) for layer in found}  # of the products, of the tokens

    def keep(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Return the hook that adds up what the experts of a layer give."""

        def hook(experts: nn.Module, inputs: tuple[Any, ...]) -> None:
            x, chosen, weights = inputs  # (tokens, hidden), (tokens, k), (tokens, k)
            for choice in range(chosen.shape[1]):
                # One expert a token, with the weight 1: its output alone.
                of_token = chosen[:, choice : choice + 1]
                output = type(experts).forward(experts, x, of_token, torch.ones_like(weights[:, :1]))
                product = weights[:, choice].double() * output.float().norm(dim=-1).double()
                both = torch.stack([product, torch.ones_like(product)]).cpu()
                sums[layer].index_add_(1, of_token[:, 0].cpu(), both)

        return hook

    with ExitStack() as stack:
        for layer, mixture in found.items():
            stack.callback(mixture.get_submodule("experts").register_forward_pre_hook(keep(layer)).remove)
        run(settings, model, windows, before, journal)
    return {layer: products / tokens.clamp(min=1) for layer, (products, tokens) in sums.items()}


_SCORES: Mapping[str, Callable[[Dress, PreTrainedModel, Tensor, Selection, Journal], Scores]] = {
    "random": _random,
    "magnitude": _magnitude,
    "activation": _saliency,
}
