"""Prune&Comp (arXiv 2507.18212): the stream before removed layers is scaled to the magnitude that it had behind them.

For every run of removed layers i … j,

    α = mean over windows and channels of  Σ_t |x_{j+1}| / Σ_t |x_i|

over the tokens t of a calibration window, x_i the dense model's stream before layer i and x_{j+1} behind layer j. All channels count the
same, as in the paper's code, so that the few of very large values do not decide. Everything that writes the stream before the run is then
multiplied by α: token and position embeddings, and the last projections, with their biases, of attention and MLP in the layers 0 … i − 1.
The paper removes one layer a round and measures α in the model with the factors so far, as the method `prunecomp` does while it chooses; here
the α of a run is measured in the dense model, across the whole run.

Below the run this is exact: a block reads the stream through a norm, which undoes a common factor but for its ε, so that only the
stream's scale at the seam changes, by exactly α. A factor on embeddings or branches (Gemma, Granite) does not change that. A head
that shares its table with the embedding is multiplied along with it, and the final norm by 1/α for it (1 + w where the norm
multiplies by that), so that the logits keep their scale. Families with norms between the branches and the stream are refused: those of OLMo 2 read the stream itself, those of OPT-350m
undo the factor, and in Gemma the norms behind the branches are the writers. Mixtures of experts are refused, since the table of
families does not name their writers. Nothing changes for removed channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from components.lib.errors import Refusal
from components.lib.recipe.section import Count
from components.lib.training.journal import Journal
from components.lib.transfers import Transfer, check_writers
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Scale(Transfer):
    """Scale the stream before removed layers to its magnitude behind them (Prune&Comp)."""

    name: ClassVar[str] = "scale"

    windows: Count = Field(
        default=64, description="Calibration windows that are measured on; all of them if there are fewer."
    )

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse families whose blocks read the stream through no norm, or write it through one, or have unknown matrices."""
        check_writers(checkpoint, f"regularize.transfer is {self.name}")
        if checkpoint.family.wraps:
            raise Refusal(
                f"regularize.transfer is {self.name}, and in {checkpoint.family.title} the projector of the other towers writes the residual "
                "stream too: use ridge, reconstruct, merge or none"
            )
        layout = checkpoint.family.layout
        for name, tensor in checkpoint.tensors.items():
            if len(tensor.shape) > 1 and layout is not None and layout.segments(name.rpartition(".")[0]) is None:
                raise Refusal(
                    f"regularize.transfer is {self.name}, and the layout in components/lib/transformer/families.py does not say whether "
                    f"{name} writes the residual stream: add its module there (docs/families.md shows how), or use ridge"
                )

    def apply(self, model: PreTrainedModel, windows: Tensor, selection: Selection, *, journal: Journal) -> None:
        """Scale what writes the stream before each run of removed layers, in place."""
        from components.lib.training.refit import runs_of
        from components.lib.training.scale import ratio_of_magnitudes, scale_stream

        runs = runs_of(selection.removed)
        # All are measured in the dense model, before any weight changes.
        ratios = ratio_of_magnitudes(model, windows[: self.windows], runs)
        for number, ((first, _), ratio) in enumerate(zip(runs, ratios, strict=True), 1):
            scale_stream(model, first, ratio)
            journal.progress(number, len(runs))
