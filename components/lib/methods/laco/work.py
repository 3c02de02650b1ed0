"""LaCo's choice of layers (arXiv 2402.11187, algorithm 1).

From the last layers to the first, the C − 1 layers behind layer l are merged into it (transfer `merge`). The merge is kept if the cosine
similarity of the dense model's final state and the merged model's, each window flattened, is at least T in the mean of a few windows; the next
one is tried I layers below. If it is not kept, the next one is tried one layer below.

Two things differ from the paper. It removes as many layers as pass T; here the ratio says how many: the search ends when they are
merged, and if it reaches the first layer before that, T falls to the best similarity that was refused, and the search begins
again. And where a merge holds a merged layer, the paper adds up the merged weights; here the dense model's, so that the choice measures what the
transfer makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from components.lib.training.journal import Journal, Silent
from components.lib.training.refit import runs_of
from components.lib.transfers.merge import Merge
from components.lib.transformer.gates import blocks, bypassed, final_state, removable
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from components.lib.methods.laco import LaCo


def choose(settings: LaCo, model: PreTrainedModel, windows: Tensor, *, journal: Journal) -> Selection:
    """Choose layers. `scores["distance"]` is 1 − similarity at the last attempt to merge each; of layer 0, which is never merged, the largest."""
    measured = windows[: settings.samples]
    dense = _final_states(model, measured, settings.batch_size)
    stay, order = list(range(len(blocks(model)))), list[int]()
    count, threshold = settings.count(len(stay)), settings.threshold
    distances: dict[int, float] = {}
    free = set(removable(model))
    while len(order) < count:
        refused = list[float]()
        at = max(0, len(stay) - settings.merged)
        while at >= 0 and len(order) < count:
            group = list(takewhile(free.__contains__, stay[at + 1 : at + settings.merged]))[: count - len(order)]
            if not group:
                at -= 1
                continue
            with _merged(model, [*order, *group]):
                similarity = _similarity(dense, _final_states(model, measured, settings.batch_size))
            distances |= dict.fromkeys(group, 1 - similarity)
            if similarity >= threshold:
                order += group
                stay = [layer for layer in stay if layer not in group]
                refused.clear()  # they were measured without this merge
                at = min(at - settings.interval, len(stay) - settings.merged)
                journal.progress(len(order), count, similarity=similarity)
            else:
                refused.append(similarity)
                at -= 1
        threshold = min(threshold, max(refused, default=threshold))
    largest = max(distances.values())
    scores = [distances.get(layer, largest) for layer in range(len(blocks(model)))]
    return Selection.of_layers(settings.name, order, {"distance": scores})


@contextmanager
def _merged(model: PreTrainedModel, removed: Sequence[int]) -> Iterator[None]:
    """Let the model compute with the layers merged into those before them; its weights are as they were afterwards."""
    changed = [weight for first, _ in runs_of(removed) for weight in blocks(model)[first - 1].parameters()]
    kept = [weight.detach().clone() for weight in changed]
    try:
        Merge().apply(model, torch.empty(0), Selection.of_layers("laco", removed), journal=Silent())
        with bypassed(model, removed):
            yield
    finally:
        with torch.no_grad():
            for weight, before in zip(changed, kept, strict=True):
                weight.copy_(before)


@torch.no_grad()
def _final_states(model: PreTrainedModel, windows: Tensor, batch_size: int) -> Tensor:
    """Return the head's input (windows, length, hidden), on the CPU."""
    states = []
    with final_state(model) as state:
        for batch in windows.split(batch_size):
            model(input_ids=batch.long().to(model.device), use_cache=False)
            assert state.value is not None
            states.append(state.value.cpu())
    return torch.cat(states)


def _similarity(one: Tensor, other: Tensor) -> float:
    """Return the cosine similarity of two windows' states (windows, length, hidden), each flattened, in the mean; −1 if it is not a number."""
    flat = functional.cosine_similarity(one.flatten(1).double(), other.flatten(1).double())
    return flat.nan_to_num(nan=-1.0).mean().item()
