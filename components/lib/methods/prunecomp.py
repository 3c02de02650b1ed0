"""Prune&Comp's choice (arXiv 2507.18212): one layer a round, each followed by the compensation of its magnitude.

Each round removes the layer of smallest Block Influence (`shortgpt`), and from then on the stream is multiplied at its place by

    α = mean over windows and channels of  Σ_t |f(x)_t| / Σ_t |x_t|

so that the next round measures a model whose stream has the magnitude that the layers behind the removed one know. Once the layers
are chosen, the transfer `scale` puts the factors into the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from components.lib.methods import BatchSize, LayerMethod
from components.lib.training.journal import Journal
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class PruneComp(LayerMethod):
    """Prune&Comp's choice: a round a layer, by Block Influence in the model whose magnitudes are compensated."""

    name: ClassVar[str] = "prunecomp"
    title: ClassVar[str] = "Prune&Comp"
    scores = {  # noqa: RUF012
        "block_influence": "the layer's Block Influence, when last measured (1 − mean cosine between what enters and what leaves it)"
    }

    batch_size: BatchSize = 8

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose in rounds of one pass over the windows for the influences, and one for the factor of the layer that is removed."""
        import torch

        from components.lib.methods.shortgpt import block_influence
        from components.lib.training.scale import ratio_of_magnitudes
        from components.lib.transformer.gates import blocks, bypassed, gated, removable

        layers = range(len(blocks(model)))
        count = self.count(len(layers))
        factors = torch.ones(len(layers))
        scores = [0.0 for _ in layers]
        order: list[int] = []
        for number in range(count):
            # A bypassed layer gives x, and its gate on the output gives α · x.
            with bypassed(model, order), gated(model, factors, "output"):
                left = [layer for layer in removable(model) if layer not in order]
                influence = block_influence(model, windows, left, self.batch_size)
                scores = [influence.get(layer, scores[layer]) for layer in layers]
                layer = min(left, key=scores.__getitem__)
                (factors[layer],) = ratio_of_magnitudes(model, windows, [(layer, layer)])
            order.append(layer)
            journal.progress(number + 1, count, influence=scores[layer])
        return Selection.of_layers(self.name, order, {"block_influence": scores})
