"""Choose runs of neighbouring layers by what the cut model computes once the projection before each run is re-fitted.

1. One forward pass of the dense model records the stream behind every layer and the input of every layer's last projection.
2. For every run i … j of at most `longest` layers, the projection before it is fitted in closed form (`refit`), which gives the stream
   that the cut model has in place of the dense one's behind layer j. The rest of the dense model, layers j + 1 and on, reads it on a few
   other windows, and the run's cost is

       KL(p_dense ‖ p_run)   in nats a token.

   The layers below the run are never computed again. The error of the stream itself misleads: it does not tell which directions count.
3. The sets of runs with the least sum of costs are found by dynamic programming, a layer that stays between any two runs.
4. The first of them are measured whole: every seam fitted in order, then the divergence on the same windows. The least one is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from heapq import nsmallest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.lib.training.journal import Journal
from components.lib.training.refit import (
    BATCH,
    Sums,
    branch_scale,
    fit_seams,
    run_blocks,
    runs_of,
    seen_by,
    streams,
    writer_of,
)
from components.lib.transformer.gates import blocks, bypassed, watched
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Run:
    """A run of neighbouring layers, with its costs when it alone is removed and the projection before it is fitted."""

    first: int
    last: int
    divergence: float
    """KL(p_dense ‖ p_run), nats a token."""
    error: float
    """Squared error of the stream behind the run, relative to the squared change that the run makes."""

    @property
    def length(self) -> int:
        """How many layers it has."""
        return self.last - self.first + 1


@torch.no_grad()
def runs_with_costs(
    model: PreTrainedModel,
    fitted: Tensor,
    probed: Tensor,
    longest: int,
    strength: float,
    done: Callable[[int, int], None] = lambda number, total: None,
    batch_size: int = BATCH,
) -> list[Run]:
    """Return every run of 1 … `longest` layers that does not begin with layer 0, with its costs.

    The streams behind all layers and the inputs of all projections are held at once, on the CPU, in the model's type: about
    2 · layers · (hidden + ffn) bytes a token.

    Args:
        model: the dense model; it is left as it was.
        fitted: token ids (windows, length) to fit on.
        probed: other windows, to measure on.
        longest: the longest run.
        strength: λ of the fit, relative to the mean diagonal.
        done: called with the number of layers that are done, and of all.
        batch_size: windows a forward pass.
    """
    layers = len(blocks(model))
    states, inputs = _record(model, torch.cat([fitted, probed]), batch_size)
    dense = _log_probabilities(model, probed)
    count = len(fitted)
    runs = []
    for layer in range(layers - 1):
        writer = writer_of(model, layer, "ffn")
        scale = branch_scale(model, fitted, layer, writer)
        x, lasts = inputs[layer], range(layer + 1, min(layer + longest + 1, layers))
        missing = [(states[last].float() - states[layer].float()) / scale for last in lasts]
        sums = Sums(x.shape[-1], sum(part.shape[-1] for part in missing), x.device)
        # One system for all runs behind this layer: they share its inputs.
        sums.add(x[:count, 1:].flatten(0, 1), torch.cat([part[:count, 1:].flatten(0, 1) for part in missing], dim=-1))
        change, shift = sums.solve(strength, bias=writer.bias is not None)
        added = (x[count:].float() @ change.float() + shift.float()).chunk(len(missing), dim=-1)
        for last, lacks, gets in zip(lasts, missing, added, strict=True):
            error = (gets - lacks[count:])[:, 1:].square().sum() / lacks[count:, 1:].square().sum()
            stream = (states[layer][count:].float() + scale * gets).to(states[layer].dtype)
            divergence = _divergence(dense, _log_probabilities(model, probed, last, stream))
            runs.append(Run(layer + 1, last, divergence, error.item()))
        done(layer + 1, layers - 1)
    return runs


def _record(model: PreTrainedModel, windows: Tensor, batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the streams behind all layers (windows, length, hidden), and the inputs of their last projections (…, ffn)."""
    layers = range(len(blocks(model)))
    states: list[list[Tensor]] = [[] for _ in layers]
    inputs: list[list[Tensor]] = [[] for _ in layers]
    with ExitStack() as stack:
        seen = [stack.enter_context(seen_by(writer_of(model, layer, "ffn").module, "input")) for layer in layers]
        at = stack.enter_context(watched(model, layers))
        for batch in run_blocks(model, windows, len(layers) - 1, batch_size):
            for layer in layers:
                states[layer].append(at[layer][1].cpu())
                inputs[layer].append(seen[layer][0].reshape(*batch.shape, -1).cpu())
    return [torch.cat(parts) for parts in states], [torch.cat(parts) for parts in inputs]


@contextmanager
def _injected(model: PreTrainedModel, layer: int, stream: Tensor) -> Iterator[None]:
    """Let the stream behind a layer be `stream` (windows, length, hidden), and compute none of the layers through it."""

    def replace(block: nn.Module, inputs: Any, named: Any, output: Any) -> Tensor:
        return stream.to(model.device)

    with bypassed(model, range(layer + 1)):
        handle = blocks(model)[layer].register_forward_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _log_probabilities(
    model: PreTrainedModel, windows: Tensor, layer: int | None = None, stream: Tensor | None = None
) -> Tensor:
    """Return the log-probabilities (windows, length, vocabulary) on the CPU, from a given stream behind `layer` if there is one."""
    with ExitStack() as stack:
        if layer is not None and stream is not None:
            stack.enter_context(_injected(model, layer, stream))
        logits = model(input_ids=windows.long().to(model.device), use_cache=False).logits
    return functional.log_softmax(logits.float(), dim=-1).cpu()


def _divergence(dense: Tensor, other: Tensor) -> float:
    """Return KL(dense ‖ other), nats a token, of log-probabilities (windows, length, vocabulary); first tokens are left out."""
    # A window at a time: the vocabulary is large.
    tokens = [(p.exp() * (p - q)).sum(-1)[1:] for p, q in zip(dense, other, strict=True)]
    return torch.cat(tokens).mean().item()


def cheapest_sets(runs: Sequence[Run], layers: int, count: int, keep: int) -> list[tuple[int, ...]]:
    """Return the `keep` sets of `count` layers of least summed divergence, cheapest first: runs with a layer between any two.

    Dynamic programming over the layers: the cheapest sets of n layers among the first l are those without layer l − 1, and those of
    which a run ends there.

    Args:
        runs: the runs to choose among.
        layers: of the model.
        count: how many layers are removed.
        keep: how many sets.
    """
    ending: dict[int, list[Run]] = {}
    for run in runs:
        ending.setdefault(run.last, []).append(run)
    Set = tuple[float, tuple[int, ...]]
    # best[l][n]: of the layers 0 … l − 1, n are removed.
    best: list[list[list[Set]]] = [[[] for _ in range(count + 1)]]
    best[0][0].append((0.0, ()))
    for layer in range(layers):
        row: list[list[Set]] = []
        for number in range(count + 1):
            sets = list(best[layer][number])
            for run in ending.get(layer, ()):
                if run.length <= number:
                    # The layer before a run stays: the others are chosen among those before it.
                    before = best[max(0, run.first - 1)][number - run.length]
                    own = tuple(range(run.first, run.last + 1))
                    sets += [(cost + run.divergence, chosen + own) for cost, chosen in before]
            row.append(nsmallest(keep, sets))
        best.append(row)
    return [chosen for _, chosen in best[layers][count]]


@torch.no_grad()
def divergence_after_fit(
    model: PreTrainedModel,
    fitted: Tensor,
    probed: Tensor,
    targets: dict[int, Tensor],
    removed: Sequence[int],
    strength: float,
    batch_size: int = BATCH,
) -> float:
    """Return KL(p_dense ‖ p_cut), nats a token, of the model without `removed` and with its seams fitted; the model is left as it was."""
    dense = _log_probabilities(model, probed)
    seams = [writer_of(model, first - 1, "ffn") for first, _ in runs_of(removed) if first > 0]
    kept = [(seam, seam.weight.clone(), None if seam.bias is None else seam.bias.clone()) for seam in seams]
    try:
        fit_seams(
            model, fitted, targets, Selection(method="seam", removed=tuple(removed)), strength, batch_size=batch_size
        )
        with bypassed(model, removed):
            return _divergence(dense, _log_probabilities(model, probed))
    finally:
        for seam, weight, bias in kept:
            seam.weight.copy_(weight)
            if seam.bias is not None and bias is not None:
                seam.bias.copy_(bias)


def choose_runs(
    model: PreTrainedModel,
    windows: Tensor,
    count: int,
    *,
    journal: Journal,
    strength: float = 0.1,
    longest: int = 8,
    shortlist: int = 6,
    fit_tokens: int = 4096,
    measure_tokens: int = 1024,
    batch_size: int = BATCH,
) -> tuple[tuple[int, ...], list[Run]]:
    """Return the `count` layers to remove, ascending, and the costs of all runs that were compared.

    Args:
        model: the dense model; it is left as it was.
        windows: token ids (windows, length).
        count: how many layers are removed.
        journal: takes progress.
        strength: λ of the fit, relative to the mean diagonal.
        longest: the longest run that is compared; longer ones if no set of such runs has `count` layers.
        shortlist: how many sets of runs are measured whole; 0 takes the set of least summed cost.
        fit_tokens: how many tokens the runs are fitted on, from the first windows.
        measure_tokens: how many the divergence is measured on, from the last windows, at most a quarter of all.
        batch_size: windows a forward pass.

    Raises:
        Refusal: the model's projections do not write the stream.
    """
    layers = len(blocks(model))
    total = layers - 1 + shortlist
    fitted, probed = _parted(windows, fit_tokens, measure_tokens)
    # Of n layers in runs of at most k, each with a layer before it, n − ⌈n / (k + 1)⌉ can be removed.
    while layers - -(-layers // (longest + 1)) < count:
        longest += 1
    costs = runs_with_costs(
        model,
        fitted,
        probed,
        min(longest, count),
        strength,
        lambda number, _: journal.progress(number, total),
        batch_size,
    )
    sets = cheapest_sets(costs, layers, count, max(1, shortlist))
    if shortlist == 0 or len(sets) == 1:
        if shortlist:
            journal.progress(total, total)
        return sets[0], costs
    targets = streams(model, fitted, sorted({last for chosen in sets for _, last in runs_of(chosen)}), batch_size)
    measured = []
    for number, chosen in enumerate(sets, 1):
        measured.append(divergence_after_fit(model, fitted, probed, targets, chosen, strength, batch_size))
        done = total if number == len(sets) else layers - 1 + number
        journal.progress(done, total, divergence=measured[-1])
    return sets[measured.index(min(measured))], costs


def _parted(windows: Tensor, fit_tokens: int, measure_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the windows to fit on and others to measure on; one window serves for both if there is no other."""
    count, length = windows.shape
    probed = min(max(1, measure_tokens // length), max(1, count // 4))
    fitted = min(max(1, fit_tokens // length), max(1, count - probed))
    return windows[:fitted], windows[-probed:]
