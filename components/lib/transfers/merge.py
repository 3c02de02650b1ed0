"""LaCo (arXiv 2402.11187): the weights of removed layers are merged into the layer before them.

For every run of removed layers i … j, every parameter θ of the layer before it becomes

    θ_{i−1} + Σ_{k=i…j} (θ_k − θ_{i−1})

It needs no data and holds for every family whose layers have the same parameters; LaCo also chooses the layers, which is a method's
work here. It changes nothing for removed channels or for a run that begins with layer 0, which has no layer before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from components.lib.errors import Refusal
from components.lib.training.journal import Journal
from components.lib.transfers import Transfer
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Merge(Transfer):
    """Add the differences of the removed layers' weights to the layer before them (LaCo)."""

    name: ClassVar[str] = "merge"

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse a checkpoint whose layers do not all have the same parameters."""
        shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, tensor in checkpoint.tensors.items():
            block = checkpoint.family.block_of(name)
            if block:
                shapes.setdefault(block[0], {})[name[block[2] :]] = tuple(tensor.shape)
        other = [layer for layer in sorted(shapes) if shapes[layer] != shapes[0]]
        if other:
            raise Refusal(
                f"regularize.transfer is {self.name}, which adds up the weights of layers, but layer {other[0]} has other tensors than layer 0: "
                "use none"
            )

    def apply(self, model: PreTrainedModel, windows: Tensor, selection: Selection, *, journal: Journal) -> None:
        """Merge each run of removed layers into the layer before it, in place."""
        import torch

        from components.lib.training.refit import runs_of
        from components.lib.transformer.gates import blocks

        found = blocks(model)
        runs = [run for run in runs_of(selection.removed) if run[0] > 0]
        with torch.no_grad():
            for number, (first, last) in enumerate(runs, 1):
                removed = [dict(found[layer].named_parameters()) for layer in range(first, last + 1)]
                for name, weight in found[first - 1].named_parameters():
                    own = weight.double()
                    weight.copy_(own + sum(other[name].double() - own for other in removed))
                journal.progress(number, len(runs))
