"""Least squares of the projections that write the residual stream, on sums that are streamed over the windows.

A projection that reads x and is to write r more than it does takes the change of its weights

    D = argmin ‖X D − R‖² + λ ‖D‖² = (XᵀX + λ)⁻¹ XᵀR,    λ = strength · mean(diag XᵀX)

so that only XᵀX and XᵀR are held, whatever the number of tokens. A bias is fitted without λ: both sides are centred first.
The systems are solved in float64. The first token of each window is left out: its state is many times larger than the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from components.lib.errors import Refusal
from components.lib.training import ranks
from components.lib.transformer.channels import kept_indices, layout_of
from components.lib.transformer.gates import blocks, bypassed, family_in, watched
from components.lib.transformer.layout import Axis
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import NO_CHANNELS, Channels, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 8
"""Windows a forward pass."""

Side = Literal["input", "output"]


class Sums:
    """The sums of a least-squares problem, added up batch by batch in float64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens = 0
        self.gram, self.cross = zeros(inputs, inputs), zeros(inputs, outputs)
        self.input, self.output = zeros(inputs), zeros(outputs)

    def add(self, x: Tensor, r: Tensor) -> None:
        """Add tokens: the inputs x (tokens, inputs), and r (tokens, outputs), which the outputs lack."""
        x, r = x.float(), r.float()
        self.tokens += len(x)
        self.gram += x.T @ x
        self.cross += x.T @ r
        self.input += x.sum(0)
        self.output += r.sum(0)

    def solve(self, strength: float, kept: Tensor | None = None, bias: bool = False) -> tuple[Tensor, Tensor]:
        """Return the change of the weights (inputs, outputs) and of the bias (outputs,), from the tokens of all processes.

        Args:
            strength: λ relative to the mean diagonal of XᵀX.
            kept: the inputs that stay; the weights of the others do not change. All inputs when None.
            bias: whether the projection has one; its change is 0 otherwise.
        """
        gram, cross, x, r = (ranks.summed(sums) for sums in (self.gram, self.cross, self.input, self.output))
        tokens = ranks.summed(torch.tensor(self.tokens))
        if bias:
            gram = gram - torch.outer(x, x) / tokens
            cross = cross - torch.outer(x, r) / tokens
        kept = torch.arange(len(gram)) if kept is None else kept
        kept = kept.to(gram.device)
        gram = gram[kept][:, kept]
        gram.diagonal().add_(strength * gram.diagonal().mean().clamp(min=1e-30))
        change = torch.zeros_like(self.cross)
        change[kept] = torch.linalg.solve(gram, cross[kept])
        shift = (r - x @ change) / tokens
        return change, shift if bias else torch.zeros_like(shift)


@dataclass(frozen=True)
class Writer:
    """A projection of a block that writes the residual stream."""

    module: nn.Module
    input_first: bool
    """Whether its weight is stored (inputs, outputs), as GPT-2's are."""

    @property
    def weight(self) -> Tensor:
        """The weights as (inputs, outputs), a view."""
        stored: Any = self.module.weight.data
        return stored if self.input_first else stored.T

    @property
    def bias(self) -> Tensor | None:
        """The bias (outputs,), or None."""
        bias: Any = self.module.bias
        return None if bias is None else bias.data

    def change(self, weights: Tensor, shift: Tensor) -> None:
        """Add to the weights (inputs, outputs) and the bias (outputs,), in place."""
        self.weight.copy_(self.weight.double() + weights)
        if self.bias is not None:
            self.bias.copy_(self.bias.double() + shift)


def writer_of(model: PreTrainedModel, layer: int, axis: Axis) -> Writer:
    """Return the projection of a layer that reads an axis, ffn or heads, and writes the residual stream.

    Raises:
        Refusal: the family has no layout, or the layer has no such projection, or several.
    """
    found = writers_in(model, layer, axis)
    if len(found) != 1:
        raise Refusal(
            f"layer {layer} has {len(found)} projections from {axis} to the residual stream, and one is re-fitted: use no transfer"
        )
    (module,) = found.values()
    return Writer(module, layout_of(family_in(model)).input_first(_written_by(axis)))


def writers_in(model: PreTrainedModel, layer: int, axis: Axis) -> dict[str, nn.Module]:
    """Return the projections of a layer that read an axis, ffn or heads, and write the residual stream, by their names in the block."""
    layout = replace(layout_of(family_in(model)), within=None)  # the names within a block are not those in the model
    modules = blocks(model)[layer].named_modules()
    return {name: module for name, module in modules if name and layout.segments(name) == _written_by(axis)}


def _written_by(axis: Axis) -> list[list[str]]:
    """Return the segments of a projection from an axis to the residual stream."""
    return [["hidden"], ["ffn" if axis == "ffn" else "query"]]


def runs_of(removed: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs of neighbouring layers, as (first, last), ascending.

    >>> runs_of([4, 5, 9, 6])
    [(4, 6), (9, 9)]
    """
    runs: list[tuple[int, int]] = []
    for layer in sorted(removed):
        if runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


@torch.no_grad()
def run_blocks(model: PreTrainedModel, windows: Tensor, through: int, batch_size: int = BATCH) -> Iterator[Tensor]:
    """Run the model through block `through` on each batch of windows, without its head; yield the batch when it is done."""
    with bypassed(model, range(through + 1, len(blocks(model)))):
        for batch in windows.split(batch_size):
            model.base_model(input_ids=batch.long().to(model.device), use_cache=False)
            yield batch


@torch.no_grad()
def streams(
    model: PreTrainedModel, windows: Tensor, layers: Sequence[int], batch_size: int = BATCH
) -> dict[int, Tensor]:
    """Return the residual stream behind each of `layers`: (windows, length, hidden), in the model's type, on the CPU."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    if layers:
        with watched(model, layers) as seen:
            for _ in run_blocks(model, windows, max(layers), batch_size):
                for layer in layers:
                    found[layer].append(seen[layer][1].cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@contextmanager
def seen_by(module: nn.Module, side: Side) -> Iterator[list[Tensor]]:
    """Yield a list whose only entry is, after each forward pass, the module's input or output."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [inputs[0] if side == "input" else output]

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def branch_scale(model: PreTrainedModel, windows: Tensor, layer: int, writer: Writer) -> float:
    """Return the factor by which a block adds the projection's output to the stream (1, or Granite's residual multiplier).

    It is measured: the output is changed by noise on the first window, and the stream behind the block must change in proportion.

    Raises:
        Refusal: it does not, since a norm stands between them: least squares on the stream do not hold.
    """

    def output() -> Tensor:
        with watched(model, [layer]) as seen:
            list(run_blocks(model, windows[:1], layer))
            return seen[layer][1]

    before = output()
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
    noise = noise * before[:, 1:].std()  # as large as the stream, so that rounding does not count
    handle = writer.module.register_forward_hook(lambda module, inputs, out: out + noise.view_as(out))
    try:
        difference = (output().double() - before.double())[:, 1:]
    finally:
        handle.remove()
    added = noise.double()[:, 1:]
    scale = ((difference * added).sum() / added.square().sum()).item()
    if not (difference - scale * added).norm() <= 0.1 * difference.norm():  # so that NaN is refused
        raise Refusal(
            f"layer {layer} does not add the output of its last projection to the residual stream, so that the projection cannot be "
            "fitted to the stream: use the transfer none or merge"
        )
    return scale


@torch.no_grad()
def sums_at_seam(
    model: PreTrainedModel,
    windows: Tensor,
    target: Tensor,
    layer: int,
    *,
    without: Sequence[int] = (),
    channels: Channels = NO_CHANNELS,
    side: Side = "input",
    batch_size: int = BATCH,
) -> Sums:
    """Return the sums for a re-fit of a layer's ffn projection, so that the stream behind the layer becomes `target`.

    Several processes take a part of the windows each.

    Args:
        model: the full-size model with the re-fits so far.
        windows: token ids (windows, length).
        target: the stream to give (windows, length, hidden).
        layer: whose projection is fitted.
        without: layers that are removed.
        channels: channels that are removed.
        side: fit the projection itself (input), or a matrix behind it (output).
        batch_size: windows a forward pass.
    """
    writer = writer_of(model, layer, "ffn")
    inputs, outputs = writer.weight.shape
    sums = Sums(inputs if side == "input" else outputs, outputs, model.device)
    done, target = 0, ranks.share(target)
    with ExitStack() as stack:
        stack.enter_context(bypassed(model, [other for other in without if other < layer]))
        scale = branch_scale(model, windows, layer, writer)
        stack.enter_context(narrowed(model, channels))
        seen = stack.enter_context(seen_by(writer.module, side))
        at = stack.enter_context(watched(model, [layer]))
        for batch in run_blocks(model, ranks.share(windows), layer, batch_size):
            goal = target[done : done + len(batch)].to(model.device)
            done += len(batch)
            missing = (goal.float() - at[layer][1].float()) / scale
            sums.add(_tokens(seen[0], batch), _tokens(missing, batch))
    return sums


def _tokens(values: Tensor, batch: Tensor) -> Tensor:
    """Return the values of all tokens but the first of each window: (tokens, width)."""
    # Some families (OPT) flatten windows into tokens within a block.
    return values.reshape(*batch.shape, -1)[:, 1:].flatten(0, 1)


def kept_inputs(model: PreTrainedModel, channels: Channels, layer: int, axis: Axis) -> Tensor | None:
    """Return the indices of a writer's inputs that stay, or None if all stay."""
    layout = layout_of(family_in(model))
    segment = "ffn" if axis == "ffn" else "query"
    kept = kept_indices(layout.widths(model.config.to_dict()), [segment], channels.at(layer))
    return None if kept is None else torch.tensor(kept)


@torch.no_grad()
def fit_seams(
    model: PreTrainedModel,
    windows: Tensor,
    targets: Mapping[int, Tensor],
    selection: Selection,
    strength: float,
    done: Callable[[], None] = lambda: None,
    batch_size: int = BATCH,
) -> None:
    """Re-fit the ffn projection before each run of removed layers, in place, so that it also adds what the run added.

    Args:
        model: the full-size model. The inputs are those that it has without the selection, with the seams before this one fitted.
        windows: token ids (windows, length).
        targets: last layer of each run → the dense model's stream behind it (windows, length, hidden), from `streams`.
        selection: what is removed. A run that begins with layer 0 has no layer before it, and nothing is fitted for it.
        strength: λ relative to the mean diagonal.
        done: called after each run.
        batch_size: windows a forward pass.
    """
    for first, last in runs_of(selection.removed):
        if first == 0:
            continue
        layer, writer = first - 1, writer_of(model, first - 1, "ffn")
        sums = sums_at_seam(
            model,
            windows,
            targets[last],
            layer,
            without=selection.removed,
            channels=selection.channels,
            batch_size=batch_size,
        )
        kept = kept_inputs(model, selection.channels, layer, "ffn")
        writer.change(*sums.solve(strength, kept, writer.bias is not None))
        done()


GRAMS = 2**31
"""Bytes of Gram matrices held at once: layers are fitted in groups of as many, a pass over the windows each."""


@torch.no_grad()
def refit_channels(
    model: PreTrainedModel,
    windows: Tensor,
    selection: Selection,
    strength: float,
    done: Callable[[], None] = lambda: None,
    layers: Sequence[int] | None = None,
) -> None:
    """Re-fit, in every layer that stays or in those of `layers`, the projections that read removed ffn channels or heads, in place.

    With S the inputs that stay, R the removed ones and G = XᵀX of the dense model: W_S += (G_SS + λ)⁻¹ G_SR W_R.

    Args:
        model: the full-size model.
        windows: token ids (windows, length).
        selection: what is removed; of its channels, ffn and heads.
        strength: λ relative to the mean diagonal.
        done: called after each projection.
        layers: the layers that are fitted, in place of all that stay.
    """
    axes: list[Axis] = [axis for axis in selection.channels.axes if axis in ("ffn", "heads")]
    stay = [layer for layer in range(len(blocks(model))) if layer not in selection.removed]
    fitted = stay if layers is None else layers
    work = [(layer, axis, writer_of(model, layer, axis)) for layer in fitted for axis in axes]
    size = max((8 * len(writer.weight) * (sum(writer.weight.shape)) for _, _, writer in work), default=1)
    group = max(1, GRAMS // size)
    # From the last layer to the first, so that each is measured in the dense model: no fitted one stands before it.
    for start in reversed(range(0, len(work), group)):
        some = work[start : start + group]
        for (layer, axis, writer), sums in zip(some, _removed_sums(model, windows, selection, some), strict=True):
            kept = kept_inputs(model, selection.channels, layer, axis)
            writer.change(*sums.solve(strength, kept, writer.bias is not None))
            done()


def _removed_sums(
    model: PreTrainedModel, windows: Tensor, selection: Selection, work: Sequence[tuple[int, Axis, Writer]]
) -> list[Sums]:
    """Return the sums of each projection: the inputs that stay, and what the removed ones wrote."""
    found = [Sums(writer.weight.shape[0], writer.weight.shape[1], model.device) for _, _, writer in work]
    with ExitStack() as stack:
        seen = [stack.enter_context(seen_by(writer.module, "input")) for _, _, writer in work]
        for batch in run_blocks(model, ranks.share(windows), work[-1][0]):
            for sums, x, (layer, axis, writer) in zip(found, seen, work, strict=True):
                kept = kept_inputs(model, selection.channels, layer, axis)
                inputs = _tokens(x[0], batch)
                gone = inputs if kept is None else inputs.index_fill(-1, kept.to(inputs.device), 0)
                sums.add(inputs - gone if kept is not None else inputs, gone.float() @ writer.weight.float())
    return found
