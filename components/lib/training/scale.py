"""The magnitude of the residual stream: measured across layers, and changed by the weights that write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from components.lib.training.refit import run_blocks
from components.lib.transformer.channels import layout_of
from components.lib.transformer.gates import family_in, watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def ratio_of_magnitudes(model: PreTrainedModel, windows: Tensor, runs: Sequence[tuple[int, int]]) -> list[float]:
    """Return the magnitude of the stream behind the last layer of each run (first, last) over that before its first, in one pass.

    It is the mean, over windows and channels, of Σ_t |x behind| / Σ_t |x before| over the window's tokens t.
    """
    summed = torch.zeros(len(runs), dtype=torch.float64)
    layers = sorted({layer for run in runs for layer in run})
    if layers:
        with watched(model, layers) as seen:
            for _ in run_blocks(model, windows, layers[-1]):
                for number, (first, last) in enumerate(runs):
                    before = seen[first][0].double().abs().sum(1)
                    behind = seen[last][1].double().abs().sum(1)  # (batch, hidden)
                    # A channel that is 0 throughout says nothing.
                    ratios = (behind / before).nan_to_num(nan=1.0, posinf=1.0)
                    summed[number] += ratios.mean(-1).sum().cpu()
    return (summed / len(windows)).tolist()


@torch.no_grad()
def scale_stream(model: PreTrainedModel, layer: int, factor: float) -> None:
    """Multiply the residual stream before `layer` by a factor: embeddings, and the projections to the stream below the layer.

    If the head shares its table with the embedding, the final norm is divided by the factor.
    """
    family = family_in(model)
    layout = layout_of(family)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        segments, block = layout.segments(name), family.block_of(f"{name}.")
        if segments is None or module is head:
            continue
        embeds = isinstance(module, nn.Embedding)
        if embeds or (block and block[0] < layer and len(segments) == 2 and segments[0] == ["hidden"]):
            _multiply(module, factor)
        elif block is None and segments == [["hidden"]] and tied:
            _divide_norm(module, factor)


def _multiply(module: nn.Module, factor: float) -> None:
    """Multiply a module's own weight and bias."""
    for parameter in module.parameters(recurse=False):
        parameter.mul_(factor)


def _divide_norm(norm: Any, factor: float) -> None:
    """Divide a norm's output by a factor, through its weight and bias."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    kept = weight.clone()
    weight.zero_()
    plain = norm(torch.linspace(1, 2, len(weight), dtype=weight.dtype, device=weight.device))
    # Some norms (Gemma, Nemotron) multiply by 1 + w: with w = 0 they still give the normalised input.
    offset = 0.0 if torch.equal(plain, torch.zeros_like(plain) if bias is None else bias) else 1.0
    weight.copy_((offset + kept) / factor - offset)
    if bias is not None:
        bias.div_(factor)
