"""SLEB (arXiv 2402.09025): remove, one at a time, the layer whose removal costs the least perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from components.lib.methods import BatchSize, LayerMethod
from components.lib.training.journal import Journal
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Sleb(LayerMethod):
    """SLEB: a greedy search, one layer a round, by perplexity on the calibration text."""

    name: ClassVar[str] = "sleb"
    title: ClassVar[str] = "SLEB"
    scores = {"perplexity": "perplexity on the calibration text without the layer, when last measured"}  # noqa: RUF012

    batch_size: BatchSize = 8

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose greedily: each round measures every layer that is left on all windows, with the removed ones skipped.

        `scores["perplexity"]` is, for each layer, the perplexity without it in the last round that measured it.
        """
        from components.lib.transformer.gates import blocks, removable
        from components.lib.transformer.perplexity import perplexities_without

        layers = range(len(blocks(model)))
        count = self.count(len(layers))
        order: list[int] = []
        scores = dict.fromkeys(layers, 0.0)
        read = 0

        def done(tokens: int) -> None:
            nonlocal read
            read += tokens
            journal.progress(read // windows.shape[1], count * len(windows))

        for _ in range(count):
            left = [layer for layer in removable(model) if layer not in order]
            scores |= perplexities_without(model, windows, order, left, self.batch_size, done)
            order.append(min(left, key=scores.__getitem__))
        return Selection.of_layers(self.name, order, {"perplexity": tuple(scores.values())})
