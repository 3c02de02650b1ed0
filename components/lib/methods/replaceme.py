"""ReplaceMe's choice (arXiv 2505.02819): one run of layers, that which changes the direction of the stream the least.

    the run i … i + n − 1 of least   1 − mean over tokens of cos(x_i, x_{i+n}),    i ≥ 1

with x_i the stream before layer i. The transfer `linear` fits the matrix that stands for the run to the layer before it, so that layer 0
stays.
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


class ReplaceMe(LayerMethod):
    """ReplaceMe's choice: the run of layers of smallest cosine distance, measured once."""

    name: ClassVar[str] = "replaceme"
    title: ClassVar[str] = "ReplaceMe"
    scores = {  # noqa: RUF012
        "cosine_distance": "1 − mean cosine between what enters and what leaves the best run that holds the layer"
    }

    batch_size: BatchSize = 8

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose the run of smallest distance. Layer 0, which is in none, has the largest score."""
        import torch
        from torch.nn import functional

        from components.lib.transformer.gates import blocks, removable, watched

        layers = len(blocks(model))
        count = self.count(layers)
        fixed = {*range(layers)} - {*removable(model)}
        firsts = (first for first in range(1, layers - count + 1) if fixed.isdisjoint(range(first, first + count)))
        similarity = dict.fromkeys(firsts, 0.0)
        done = 0
        with torch.no_grad(), watched(model, range(layers)) as seen:
            for batch in windows.split(self.batch_size):
                model(input_ids=batch.long().to(model.device), use_cache=False)
                for first in similarity:
                    x, y = seen[first][0].float(), seen[first + count - 1][1].float()
                    similarity[first] += functional.cosine_similarity(x, y, dim=-1).double().sum().item()
                done += len(batch)
                journal.progress(done, len(windows))
        distance = {first: 1 - summed / windows.numel() for first, summed in similarity.items()}
        best = min(distance, key=distance.__getitem__)
        scores = [
            min(
                (far for first, far in distance.items() if first <= layer < first + count),
                default=max(distance.values()),
            )
            for layer in range(layers)
        ]
        return Selection.of_layers(self.name, range(best, best + count), {"cosine_distance": scores})
