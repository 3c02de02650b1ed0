"""Choose runs of neighbouring layers by what the cut model computes once the projection before each run is re-fitted.

1. One forward pass of the dense model records the stream behind every layer and the input of every layer's last projection.
2. For every run i … j of at most `longest` layers, the projection before it is fitted in closed form (`refit`), which gives the stream
   that the cut model has in place of the dense one's behind layer j. The rest of the dense model, layers j + 1 and on, reads it on a few
   other windows, and the run's cost is

       KL(p_dense ‖ p_run)   in nats a token.

   The layers below the run are never computed again. The error of the stream itself misleads: it does not tell which directions count.
   In a quarter of these windows a part of the tokens is replaced by others (`corrupted`): sets of runs that one text cannot tell apart may
   differ greatly on another, and the divergence on tokens that come unexpectedly tells which of them holds there.
3. The sets of runs with the least sum of costs are found by dynamic programming, a layer that stays between any two runs. Many of them
   are the first one with a layer or two exchanged, so the shortlist takes only sets that differ enough from those before them.
4. The sets of the shortlist are measured whole: every seam fitted in order, then the divergence on the same windows. The least one is
   chosen. The layers below the first seam are never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from heapq import nsmallest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from components.lib.training.journal import Journal
from components.lib.training.objective import next_token_losses
from components.lib.training.refit import (
    BATCH,
    Sums,
    branch_scale,
    fit_seams,
    run_blocks,
    runs_of,
    seen_by,
    writer_of,
)
from components.lib.transformer.gates import blocks, bypassed, removable, resumed, watched
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CANDIDATES = 500
"""The cheapest sets of runs, among which the shortlist is sought."""
APART = 1 / 3
"""The part of its layers in which a set of the shortlist differs at least from every one before it."""
CORRUPTED = 0.3
"""The part of the tokens that is replaced in the windows that stand for other texts."""
FIT_TOKENS, MEASURE_TOKENS = 4096, 2048
"""How many tokens a set of runs is fitted on, and on how many others its divergence is measured."""


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


@dataclass(frozen=True)
class Recorded:
    """The dense model on the windows to fit on, followed by those to measure on. Everything is in the model's type, on the CPU."""

    windows: Tensor
    """Token ids (windows, length)."""
    fitted: int
    """How many of them are there to fit on."""
    states: Sequence[Tensor]
    """The stream behind each layer, (windows, length, hidden)."""
    inputs: Sequence[Tensor]
    """The input of each layer's last projection, (windows, length, ffn)."""
    logits: Tensor
    """Of the windows to measure on, (windows, length, vocabulary)."""


@torch.no_grad()
def record(model: PreTrainedModel, fitted: Tensor, probed: Tensor, batch_size: int = BATCH) -> Recorded:
    """Run the dense model once.

    About 2 · layers · (hidden + ffn) bytes a token are held.

    Args:
        model: the dense model.
        fitted: token ids (windows, length) to fit on.
        probed: other windows, to measure on.
        batch_size: windows a forward pass.
    """
    windows = torch.cat([fitted, probed])
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
    joined = [torch.cat(parts) for parts in states]
    with resumed(model, layers[-1], windows, joined[-1]):
        logits = _logits(model, probed)
    return Recorded(windows, len(fitted), joined, [torch.cat(parts) for parts in inputs], logits)


def _logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    return model(input_ids=windows.long().to(model.device), use_cache=False).logits.cpu()


@torch.no_grad()
def runs_with_costs(
    model: PreTrainedModel,
    dense: Recorded,
    longest: int,
    strength: float,
    done: Callable[[int, int], None] = lambda number, total: None,
) -> list[Run]:
    """Return every run of 1 … `longest` layers that does not begin with layer 0, with its costs.

    Args:
        model: the dense model; it is left as it was.
        dense: what it computes.
        longest: the longest run.
        strength: λ of the fit, relative to the mean diagonal.
        done: called with the number of layers that are done, and of all.
    """
    layers, count = len(dense.states), dense.fitted
    probed = dense.windows[count:]
    runs = []
    for layer in range(layers - 1):
        writer = writer_of(model, layer, "ffn")
        with _from_below(model, dense, layer):
            scale = branch_scale(model, dense.windows[:count], layer, writer)
        x, lasts = dense.inputs[layer], range(layer + 1, min(layer + longest + 1, layers))
        missing = [(dense.states[last].float() - dense.states[layer].float()) / scale for last in lasts]
        sums = Sums(x.shape[-1], sum(part.shape[-1] for part in missing), x.device)
        # One system for all runs behind this layer: they share its inputs.
        sums.add(x[:count, 1:].flatten(0, 1), torch.cat([part[:count, 1:].flatten(0, 1) for part in missing], dim=-1))
        change, shift = sums.solve(strength, bias=writer.bias is not None)
        added = (x[count:].float() @ change.float() + shift.float()).chunk(len(missing), dim=-1)
        for last, lacks, gets in zip(lasts, missing, added, strict=True):
            error = (gets - lacks[count:])[:, 1:].square().sum() / lacks[count:, 1:].square().sum()
            stream = (dense.states[layer][count:].float() + scale * gets).to(dense.states[layer].dtype)
            with resumed(model, last, probed, stream):
                divergence = _divergence(dense, _logits(model, probed))
            runs.append(Run(layer + 1, last, divergence, error.item()))
        done(layer + 1, layers - 1)
    return runs


def _from_below(model: PreTrainedModel, dense: Recorded, layer: int) -> AbstractContextManager[None]:
    """Let the forward passes on the recorded windows begin with a layer, below which nothing was changed."""
    return resumed(model, layer - 1, dense.windows, dense.states[layer - 1]) if layer > 0 else nullcontext()


def _divergence(dense: Recorded, logits: Tensor) -> float:
    """Return KL(dense ‖ other), nats a token, of the logits (windows, length, vocabulary); first tokens are left out."""
    windows = dense.windows[dense.fitted :].long()
    # A window at a time, so that leaving out its first token copies nothing: the vocabulary is large.
    found = [
        next_token_losses(q[None, 1:], ids[None, 1:], p[None, 1:])[2].item()
        for q, ids, p in zip(logits, windows, dense.logits, strict=True)
    ]
    return sum(found) / len(found)


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


def far_apart(sets: Sequence[tuple[int, ...]], keep: int) -> list[tuple[int, ...]]:
    """Return the first `keep` sets of layers of which each has APART of its layers that are not in any one before it.

    >>> far_apart([(3, 4, 5), (3, 4, 6), (3, 7, 8)], 2)
    [(3, 4, 5), (3, 4, 6)]
    """
    listed: list[tuple[int, ...]] = []
    for layers in sets:
        if len(listed) < keep and all(len({*layers} - {*other}) >= APART * len(layers) for other in listed):
            listed.append(layers)
    return listed


@torch.no_grad()
def divergence_after_fit(
    model: PreTrainedModel, dense: Recorded, removed: Sequence[int], strength: float, batch_size: int = BATCH
) -> float:
    """Return KL(p_dense ‖ p_cut), nats a token, of the model without `removed` and with its seams fitted; the model is left as it was.

    Args:
        model: the dense model.
        dense: what it computes.
        removed: layers to remove; nothing is fitted before a run that begins with layer 0.
        strength: λ of the fit, relative to the mean diagonal.
        batch_size: windows a forward pass.
    """
    fitted, probed = dense.windows[: dense.fitted], dense.windows[dense.fitted :]
    targets = {last: dense.states[last][: dense.fitted] for _, last in runs_of(removed)}
    seams = [writer_of(model, first - 1, "ffn") for first, _ in runs_of(removed) if first]
    kept = [(seam, seam.weight.clone(), None if seam.bias is None else seam.bias.clone()) for seam in seams]
    selection = Selection(method="seam", removed=tuple(removed))
    try:
        with _from_below(model, dense, min(removed) - 1):
            fit_seams(model, fitted, targets, selection, strength, batch_size=batch_size)
            with bypassed(model, removed):
                return _divergence(dense, _logits(model, probed))
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
    fit_tokens: int = FIT_TOKENS,
    measure_tokens: int = MEASURE_TOKENS,
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
        shortlist: how many sets of runs are measured whole, fewer if no more are apart; 0 takes the set of least summed cost.
        fit_tokens: how many tokens the runs are fitted on, from the first windows.
        measure_tokens: how many the divergence is measured on, from the last windows, at most a quarter of all; a quarter of them corrupted.
        batch_size: windows a forward pass.

    Raises:
        Refusal: the model's projections do not write the stream.
    """
    layers = len(blocks(model))
    total = layers - 1 + shortlist
    # Of n layers in runs of at most k, each with a layer before it, n − ⌈n / (k + 1)⌉ can be removed.
    while layers - -(-layers // (longest + 1)) < count:
        longest += 1
    fixed = {*range(layers)} - {*removable(model)}
    if fixed:  # they may stand where such runs would be
        longest = max(longest, count)
    dense = record(model, *parted(windows, fit_tokens, measure_tokens), batch_size)
    runs = runs_with_costs(
        model, dense, min(longest, count), strength, lambda number, _: journal.progress(number, total)
    )
    runs = [run for run in runs if fixed.isdisjoint(range(run.first, run.last + 1))]
    sets = far_apart(cheapest_sets(runs, layers, count, CANDIDATES if shortlist > 1 else 1), max(1, shortlist))
    if len(sets) == 1:
        if shortlist:
            journal.progress(total, total)
        return sets[0], runs
    measured = []
    for number, chosen in enumerate(sets, 1):
        measured.append(divergence_after_fit(model, dense, chosen, strength, batch_size))
        done = total if number == len(sets) else layers - 1 + number
        journal.progress(done, total, divergence=measured[-1])
    return sets[measured.index(min(measured))], runs


def parted(
    windows: Tensor, fit_tokens: int = FIT_TOKENS, measure_tokens: int = MEASURE_TOKENS
) -> tuple[Tensor, Tensor]:
    """Return the windows to fit on and others to measure on, a quarter of these corrupted.

    One window serves for all if there is no other. There are two to measure on at least.
    """
    count, length = windows.shape
    probed = min(max(1, measure_tokens // length), max(1, count // 4))
    fitted = min(max(1, fit_tokens // length), max(1, count - probed))
    measured, spoilt = windows[-probed:], max(1, probed // 4)
    plain = measured[:-spoilt] if probed > 1 else measured
    return windows[:fitted], torch.cat([plain, corrupted(measured[-spoilt:], windows)])


def corrupted(windows: Tensor, known: Tensor) -> Tensor:
    """Return windows (windows, length) with CORRUPTED of their tokens replaced; first tokens stay.

    The others are drawn from the different tokens in `known`, each as likely as any other: rare ones are among them, and those that the
    tokenizer never makes are not.
    """
    draw = torch.Generator().manual_seed(0)
    tokens = known.flatten().sort().values
    # The number of each token among the different ones; unlike `unique`, its shape does not depend on the values.
    numbers = (tokens.diff(prepend=tokens[:1]) != 0).cumsum(0)
    drawn = (torch.rand(windows.shape, generator=draw) * (numbers[-1] + 1)).long()
    others = tokens[torch.searchsorted(numbers, drawn)]
    replaced = torch.rand(windows.shape, generator=draw) < CORRUPTED
    replaced[:, 0] = False
    return torch.where(replaced, others, windows)
