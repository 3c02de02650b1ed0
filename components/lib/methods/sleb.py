"""SLEB (arXiv 2402.09025): remove, one at a time, the layer whose removal costs the least perplexity."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from components.lib.methods import Task
from components.lib.training.journal import Journal
from components.lib.transformer.gates import blocks, bypassed
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import Selection


def choose(model: PreTrainedModel, windows: Tensor, task: Task, *, journal: Journal, out: Path | None) -> Selection:
    """Choose greedily: each round measures every layer that is left on all windows, with those gone before it skipped.

    `scores["perplexity"]` is, for each layer, the perplexity without it in the last round that measured it.
    """
    layers, count = range(len(blocks(model))), task.layers(model)
    total = sum(len(layers) - gone for gone in range(count))
    order: list[int] = []
    scores = dict.fromkeys(layers, 0.0)
    done = 0
    for _ in range(count):
        for layer in (layer for layer in layers if layer not in order):
            with bypassed(model, [*order, layer]):
                scores[layer] = perplexity(model, windows, task.gates.batch_size)
            done += 1
            journal.progress(done, total, perplexity=scores[layer])
        order.append(min((layer for layer in layers if layer not in order), key=scores.__getitem__))
    return Selection(
        method="sleb", removed=tuple(sorted(order)), order=tuple(order), scores={"perplexity": tuple(scores.values())}
    )
