"""ReplaceMe (arXiv 2505.02819): a square matrix in place of a run of removed layers.

For every run of removed layers, with M the output of the last projection (`down_proj` or its equivalent) of the layer before it, Y
everything else in the stream behind that layer and L the dense model's stream behind the run,

    T = argmin ‖M T + Y − L‖² + λ ‖T − 1‖²,    λ = strength · mean(diag MᵀM)

and the projection becomes W T (a bias b becomes b T), so that the model keeps its shapes. `ridge` fits the whole projection; this
transfer is here for comparison. It holds for the families that `ridge` holds for, and changes nothing for removed channels or for a
run that begins with layer 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from components.lib.recipe.section import Count, Rate
from components.lib.training.journal import Journal
from components.lib.transfers import Transfer, check_writers
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Linear(Transfer):
    """Merge a square matrix that stands for the removed layers into the projection before them (ReplaceMe)."""

    name: ClassVar[str] = "linear"

    strength: Rate = Field(
        default=0.1, description="Weight of the distance to the identity, relative to the mean squared output."
    )
    windows: Count = Field(
        default=128, description="Calibration windows that are measured on; all of them if there are fewer."
    )

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse families whose last projection does not write the residual stream itself."""
        check_writers(checkpoint, f"regularize.transfer is {self.name}")

    def apply(self, model: PreTrainedModel, windows: Tensor, selection: Selection, *, journal: Journal) -> None:
        """Multiply the projection before each run of removed layers by its matrix T, in place, from the first run to the last."""
        from components.lib.training.refit import runs_of, streams, sums_at_seam, writer_of

        measured = windows[: self.windows]
        runs = [run for run in runs_of(selection.removed) if run[0] > 0]
        targets = streams(model, measured, [last for _, last in runs])
        for number, (first, last) in enumerate(runs, 1):
            writer = writer_of(model, first - 1, "ffn")
            sums = sums_at_seam(
                model,
                measured,
                targets[last],
                first - 1,
                without=selection.removed,
                channels=selection.channels,
                side="output",
            )
            change, shift = sums.solve(self.strength)
            bias = shift if writer.bias is None else writer.bias.double() @ change
            writer.change(writer.weight.double() @ change, bias)
            journal.progress(number, len(runs))
