"""Schedules before the cut: turn the chosen layers into the identity and the chosen channels into 0 while the rest is trained.

There are two. The *penalty* is the papers'. TRSP's penalty on layers is made independent of width, length and batch (arXiv
2505.18232 takes the unsquared norm of the whole batch, so its λ2 depends on all three):

    λ2 · Σ_{i∈P} mean over tokens of ‖f_i(x) − x‖² / ‖x‖²      (ℓ2; ℓ1: ‖f_i(x) − x‖₁ / ‖x‖₁)

DReSS's penalty on channels is a norm of the slices of the weights that the cut removes, split into attention, feed-forward and
the rest (arXiv 2501.17905, L_att + L_ffn + L_rest), each relative to its value at the start:

    λ2 · Σ_parts ‖W_R‖² / ‖W_R at the start‖²      (ℓ2; ℓ1: ‖W_R‖₁ / ‖W_R at the start‖₁), W_R the slices of all tensors of a part

*Annealing* gates the branches of the chosen layers, x + g·(f(x) − x), and the chosen channels at each projection that reads them,
and lowers g from 1 to 0. The cut then loses nothing: with the gates at 0 the model computes the same as the cut model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.lib.training.ranks import whole
from components.lib.transformer.channels import kept_rows, layout_of
from components.lib.transformer.gates import blocks, bypassed, family_in, gated, unwrapped
from components.lib.transformer.layout import Part
from components.lib.transformer.selection import Channels

Norm = Literal["l1", "l2"]


def penalty(seen: Mapping[int, tuple[Tensor, Tensor]], norm: Norm) -> Tensor:
    """Return the sum over the watched layers of the relative distance between output and input.

    Args:
        seen: layer → its input and output, each (batch, length, hidden).
        norm: which norm.
    """
    return torch.stack([relative_change(x_in, x_out, norm) for x_in, x_out in seen.values()]).sum()


def relative_change(x_in: Tensor, x_out: Tensor, norm: Norm) -> Tensor:
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


Pieces = tuple[tuple[Tensor | None, ...], ...]
"""A tensor's slice in pieces that do not overlap: for each, the indices taken along every dimension (None for all)."""


class Slices:
    """The rows and columns that the cut removes, in three parts: attention, feed-forward and the rest.

    Build it before the training, so that every part begins at 1.

    Args:
        model: the trained model, with or without adapters; adapters themselves are not sliced.
        channels: the channels to remove.
        norm: ℓ1, or ℓ2 squared.
    """

    def __init__(self, model: nn.Module, channels: Channels, norm: Norm) -> None:
        self._size = torch.square if norm == "l2" else torch.abs
        self._parts: dict[Part, list[tuple[str, Pieces]]] = {}
        for part, name, pieces in _sliced(unwrapped(model), channels):
            self._parts.setdefault(part, []).append((name, pieces))
        with torch.no_grad():
            self._start = {part: self._sum(part, model).item() for part in self._parts}

    def norms(self, model: nn.Module) -> dict[str, Tensor]:
        """Return for each part that loses channels ‖W_R‖ over all its tensors relative to its start, with gradients.

        Args:
            model: the trained model, as it is, or as the processes hold it.
        """
        return {
            f"slices_{part}": self._sum(part, model) / self._start[part]
            for part in sorted(self._parts)
            if self._start[part]
        }

    def _sum(self, part: Part, model: nn.Module) -> Tensor:
        weights = dict(unwrapped(model).named_parameters())
        sizes = [
            self._size(_taken(weight, piece).float()).sum()
            for name, pieces in self._parts[part]
            for weight in [whole(weights[name])]
            for piece in pieces
        ]
        return torch.stack([size.to(sizes[0].device) for size in sizes]).sum()


def _sliced(model: nn.Module, channels: Channels) -> Iterator[tuple[Part, str, Pieces]]:
    """Yield the name of every tensor that loses channels with its part of the model and its slice; tied weights once."""
    config: Any = model.config
    family = family_in(model)
    layout = layout_of(family)
    widths = layout.widths(config.to_dict())
    for full, weight in model.named_parameters():
        name = full.replace(".base_layer.", ".")
        if ".lora_" in name:
            continue
        block = family.block_of(name)
        kept = kept_rows(layout, widths, name, weight.shape, channels.at(block[0] if block else None))
        if any(rows is not None for rows in kept):
            yield layout.part(name), full, tuple(_pieces(kept, weight))


def _pieces(kept: Sequence[list[int] | None], weight: Tensor) -> Iterator[tuple[Tensor | None, ...]]:
    """Split the removed entries into disjoint pieces: for each dimension its removed rows, within the kept rows of earlier dimensions."""
    before: list[Tensor | None] = []
    for dimension, rows in enumerate(kept):
        if rows is None:
            before.append(None)
            continue
        stays = torch.zeros(weight.shape[dimension], dtype=torch.bool)
        stays[rows] = True
        gone = stays.logical_not().nonzero().flatten().to(weight.device)
        yield (*before, gone, *(None for _ in kept[dimension + 1 :]))
        before.append(stays.nonzero().flatten().to(weight.device))


def _taken(weight: Tensor, piece: Sequence[Tensor | None]) -> Tensor:
    for dimension, rows in enumerate(piece):
        if rows is not None:
            weight = weight.index_select(dimension, rows.to(weight.device))
    return weight
