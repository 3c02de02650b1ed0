"""TRSP's second regularisation: make the chosen layers the identity while the others learn what they knew.

Two ways to it. The *penalty* is the paper's, made free of width, length and batch (arXiv 2505.18232 takes the unsquared norm
of the whole batch, so that its λ2 depends on all three):

    λ2 · Σ_{i∈P} mean over tokens of ‖f_i(x) − x‖² / ‖x‖²      (ℓ2; ℓ1: ‖f_i(x) − x‖₁ / ‖x‖₁)

*Annealing* gates what the chosen layers add, x + g·(f(x) − x), and takes g from 1 to 0. It leaves no residual to lose at the
cut: when the gates are at 0 the layers are no longer computed at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.transformer.gates import blocks, bypassed, gated


def penalty(seen: Mapping[int, tuple[Tensor, Tensor]], norm: Literal["l1", "l2"]) -> Tensor:
    """Return the sum over the watched layers of the relative distance between output and input.

    Args:
        seen: layer → its input and output, each (batch, length, hidden).
        norm: which norm.
    """
    return torch.stack([relative_change(x_in, x_out, norm) for x_in, x_out in seen.values()]).sum()


def relative_change(x_in: Tensor, x_out: Tensor, norm: Literal["l1", "l2"]) -> Tensor:
    """Return ‖f(x) − x‖² / ‖x‖² (ℓ2) or ‖f(x) − x‖₁ / ‖x‖₁ (ℓ1), the mean over the tokens of (batch, length, hidden)."""
    x_in, change = x_in.float(), x_out.float() - x_in.float()
    size = torch.square if norm == "l2" else torch.abs
    return (size(change).sum(-1) / size(x_in).sum(-1)).mean()


def ramped(step: int, steps: int, part: float) -> float:
    """Return the factor of λ2 at a step, counted from 0: it rises linearly from 0 to 1 over `part` of the steps."""
    rising = round(part * steps)
    return min(1.0, step / rising) if rising else 1.0


def annealed(step: int, steps: int, part: float) -> float:
    """Return the chosen layers' gate at a step, counted from 0: it falls linearly from 1 to 0 over `part` of the steps."""
    return 1.0 - ramped(step, steps, part)


def gated_at(model: nn.Module, layers: Sequence[int], gate: float) -> AbstractContextManager[Any]:
    """Return the context in which the chosen layers of `model` are gated; with a gate of 0 they are not computed."""
    if not layers or gate == 1.0:
        return nullcontext()
    if gate == 0.0:
        return bypassed(model, layers)
    gates = torch.ones(len(blocks(model)))
    gates[list(layers)] = gate
    return gated(model, gates, "branch")
