"""DReSS's choice of channels (arXiv 2501.17905): a fixed part of each axis, chosen before the training.

The paper does not say which channels to remove. Here they are drawn at random, or are the channels of lowest score: of the
weights alone, or of weights and activations on the calibration windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.lib.methods import sample
from components.lib.training.journal import Journal
from components.lib.transformer.channels import channels_to_remove, layout_of
from components.lib.transformer.gates import blocks, bypassed, family_in
from components.lib.transformer.layout import Axis, axis_of
from components.lib.transformer.selection import Channels, Selection

if TYPE_CHECKING:
    from components.lib.methods.dress import Dress

Scores = Mapping[Axis, Tensor]
"""Axis → a score for each channel, (layers, channels); of hidden, which all layers share, (1, channels). The lowest are removed."""


def choose(
    settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal
) -> Selection:
    """Choose as many channels of every layer as the ratios ask for; layers that are removed lose none."""
    family = family_in(model)
    removed = channels_to_remove(family, model.config.to_dict(), settings.ratios, settings.multiple)
    scores = _SCORES[settings.channels](settings, model, windows, before, journal)

    def smallest(axis: Axis) -> tuple[tuple[int, ...], ...]:
        count = removed.get(axis, 0)
        lowest = scores[axis].argsort(dim=-1, stable=True)[:, :count].sort(dim=-1).values
        rows = [tuple(row) for row in lowest.tolist()]
        if axis != "hidden":
            rows = [() if layer in before.removed else row for layer, row in enumerate(rows)]
        return tuple(rows) if count else ()

    chosen = Channels(hidden=next(iter(smallest("hidden")), ()), ffn=smallest("ffn"), heads=smallest("heads"))
    return before.with_channels(settings.name, chosen)


class _Tally:
    """The scores of every channel, summed over the tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.family = family_in(model)
        self.layout = layout_of(self.family)
        self.widths = self.layout.widths(model.config.to_dict())
        rows: dict[Axis, int] = {"hidden": 1, "ffn": len(blocks(model)), "heads": len(blocks(model))}
        self.scores: dict[Axis, Tensor] = {
            axis: torch.zeros(count, self.widths.of(axis), dtype=torch.float64) for axis, count in rows.items()
        }

    def add(self, name: str, segments: Sequence[str], values: Tensor) -> None:
        """Add the values along a dimension of a tensor, relative to their sum, so that no tensor outweighs another.

        Args:
            name: name of the tensor or the module.
            segments: the segments of the dimension.
            values: (rows,), none negative.
        """
        axis, sizes = axis_of(segments[0]), [self.widths.size(segment) for segment in segments]
        if axis is None or sum(sizes) != len(values):  # `check_channels` refuses such a tensor if its axis is to be cut
            return
        parts = values.double().cpu().split(sizes)
        by_channel = torch.stack([part.reshape(self.widths.of(axis), -1).sum(-1) for part in parts]).sum(0)
        block = self.family.block_of(f"{name}.")
        layer = block[0] if block and axis != "hidden" else 0
        self.scores[axis][layer] += by_channel / by_channel.sum().clamp(min=1e-30)


def _random(settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal) -> Scores:
    """Score channels at random."""
    draw = torch.Generator().manual_seed(settings.seed)
    return {axis: torch.rand(scores.shape, generator=draw) for axis, scores in _Tally(model).scores.items()}


@torch.no_grad()
def _magnitude(settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal) -> Scores:
    """Score a channel by ‖W‖² of its slice of every matrix that has it as a row or column, relative to the matrix's.

    Biases and norms are excluded: after normalisation their few numbers would weigh as much as a matrix.
    """
    tally = _Tally(model)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and tally.layout.segments(name.removesuffix(".weight")):
            energy = weight.float().square()
            for dimension, segments in enumerate(tally.layout.dimensions(name)):
                tally.add(name, segments, energy.sum(1 - dimension))
    return tally.scores


@dataclass(frozen=True)
class _Moments:
    """Moments of the inputs (inputs,) of a projection, over the calibration windows."""

    mean: Tensor
    square: Tensor
    """E[x²]."""


def _activation(
    settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal
) -> Scores:
    """Score a channel by Σ_j ‖W_·j‖² · E[x_j²] over its inputs j of every projection that reads it, relative to the projection's."""
    measured = _moments(settings, model, windows, before, journal)
    return _of_readers(model, measured, lambda weight, x: weight.square().sum(0) * x.square)


def _wanda(settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal) -> Scores:
    """Score a channel by Wanda's Σ_ij |W_ij| · √E[x_j²] over its inputs j, relative to the projection's (arXiv 2306.11695)."""
    measured = _moments(settings, model, windows, before, journal)
    return _of_readers(model, measured, lambda weight, x: weight.abs().sum(0) * x.square.sqrt())


def _fluctuation(
    settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal
) -> Scores:
    """Score a channel by FLAP's Σ_j ‖W_·j‖² · Var[x_j] over its inputs j, relative to the projection's (arXiv 2312.11983).

    What an input adds in the mean a bias can add in its place, so only its variance is lost.
    """
    measured = _moments(settings, model, windows, before, journal)
    return _of_readers(
        model, measured, lambda weight, x: weight.square().sum(0) * (x.square - x.mean.square()).clamp(min=0)
    )


@torch.no_grad()
def run(settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal) -> None:
    """Run the model on the windows that are measured on, with the layers removed so far bypassed, for the hooks that look on."""
    measured = sample(windows)
    with bypassed(model, before.removed):
        done = 0
        for batch in measured.split(settings.batch_size):
            model(input_ids=batch.long().to(model.device), use_cache=False)
            done += len(batch)
            journal.progress(done, len(measured))


@torch.no_grad()
def _moments(
    settings: Dress, model: PreTrainedModel, windows: Tensor, before: Selection, journal: Journal
) -> dict[str, _Moments]:
    """Return the moments of what every projection with a known layout reads, by its name, with the layers removed so far bypassed."""
    layout = layout_of(family_in(model))
    summed: dict[str, tuple[int, Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float().flatten(0, -2)
            tokens, first, second = summed.get(name, (0, 0, 0))
            # In fp64, so that the variance is not lost in the difference.
            summed[name] = (tokens + len(x), first + x.sum(0).double(), second + x.square().sum(0).double())

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            segments = layout.segments(name)
            if segments and len(segments) == 2 and not isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(keep(name)).remove)
        run(settings, model, windows, before, journal)
    return {name: _Moments(first / tokens, second / tokens) for name, (tokens, first, second) in summed.items()}


@torch.no_grad()
def _of_readers(
    model: PreTrainedModel, measured: Mapping[str, _Moments], score: Callable[[Tensor, _Moments], Tensor]
) -> Scores:
    """Sum over the measured projections what `score` gives to their inputs, from the weights (outputs, inputs) and the moments."""
    tally = _Tally(model)
    for name, moments in measured.items():
        segments = tally.layout.segments(name) or []
        weight = model.get_parameter(f"{name}.weight").float()
        tally.add(name, segments[1], score(weight.T if tally.layout.input_first(segments) else weight, moments))
    return tally.scores


_SCORES: Mapping[str, Callable[[Dress, PreTrainedModel, Tensor, Selection, Journal], Scores]] = {
    "random": _random,
    "magnitude": _magnitude,
    "activation": _activation,
    "wanda": _wanda,
    "fluctuation": _fluctuation,
}
