"""ShortGPT (arXiv 2403.03853): remove the layers that change the direction of their input the least."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from components.lib.methods import BatchSize, LayerMethod
from components.lib.training.journal import Journal
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class ShortGPT(LayerMethod):
    """ShortGPT: the layers of smallest Block Influence, measured once."""

    name: ClassVar[str] = "shortgpt"
    title: ClassVar[str] = "ShortGPT"
    scores = {  # noqa: RUF012
        "block_influence": "the layer's Block Influence (1 − mean cosine between what enters and what leaves it)"
    }

    batch_size: BatchSize = 8

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose the layers of smallest BI_i = 1 − mean over tokens of cos(x_i, f_i(x_i))."""
        import torch
        from torch.nn import functional

        from components.lib.transformer.gates import blocks, watched

        layers = range(len(blocks(model)))
        similarity = torch.zeros(len(layers), dtype=torch.float64)
        done = 0
        with torch.no_grad(), watched(model, layers) as seen:
            for batch in windows.split(self.batch_size):
                model(input_ids=batch.long().to(model.device), use_cache=False)
                for layer, (x_in, x_out) in seen.items():
                    similarity[layer] += functional.cosine_similarity(x_in.float(), x_out.float(), dim=-1).sum().cpu()
                done += len(batch)
                journal.progress(done, len(windows))
        influence = (1 - similarity / windows.numel()).tolist()
        order = sorted(layers, key=influence.__getitem__)[: self.count(len(layers))]
        return Selection.of_layers(self.name, order, {"block_influence": tuple(influence)})
