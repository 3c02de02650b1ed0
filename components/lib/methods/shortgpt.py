"""ShortGPT (arXiv 2403.03853): remove the layers that change the direction of their input the least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        from components.lib.transformer.gates import blocks, removable

        layers = range(len(blocks(model)))
        influence = block_influence(
            model, windows, layers, self.batch_size, lambda done: journal.progress(done, len(windows))
        )
        order = sorted(removable(model), key=influence.__getitem__)[: self.count(len(layers))]
        return Selection.of_layers(self.name, order, {"block_influence": tuple(influence.values())})


def block_influence(
    model: PreTrainedModel,
    windows: Tensor,
    layers: Sequence[int],
    batch_size: int,
    done: Callable[[int], None] = lambda windows: None,
) -> dict[int, float]:
    """Return the Block Influence of each of `layers` on the windows (windows, length), in the model as it is given.

    `done` is called after each batch with the number of windows that were read.
    """
    import torch
    from torch.nn import functional

    from components.lib.transformer.gates import watched

    similarity = dict.fromkeys(layers, 0.0)
    read = 0
    with torch.no_grad(), watched(model, layers) as seen:
        for batch in windows.split(batch_size):
            model(input_ids=batch.long().to(model.device), use_cache=False)
            for layer, (x_in, x_out) in seen.items():
                cosine = functional.cosine_similarity(x_in.float(), x_out.float(), dim=-1)
                similarity[layer] += cosine.double().sum().item()
            read += len(batch)
            done(read)
    return {layer: 1 - summed / windows.numel() for layer, summed in similarity.items()}
