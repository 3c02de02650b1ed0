"""Ridge regression of the projections beside what is removed.

For every run of removed layers, the last projection (`down_proj` or its equivalent) of the layer before it is re-fitted, so that it
also adds what the run added to the residual stream:

    min_W ‖H W + Y − L‖² + λ ‖W − W₀‖²

over the tokens of calibration windows: H is the projection's input in the cut model, Y everything else in the stream behind its layer,
L the dense model's stream behind the run, W₀ the weights so far, and λ = strength · mean(diag HᵀH). Several runs are fitted from the
first to the last, each in the model with the fits before it. ReplaceMe (arXiv 2505.02819) fits a square matrix before the projection
(`linear`); the whole projection, regularised towards itself, has more freedom and keeps its own weights where the data say nothing.

For removed ffn channels and heads, the projections that read them are re-fitted on the channels S that stay, each on its own:

    W_S = (W G_·S + λ W_S) (G_SS + λ)⁻¹,    G = XᵀX of the dense model's activations

(ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983). A projection with a bias gets a fitted one: with λ → ∞ it is all that changes,
the bias of FLAP (arXiv 2312.11983). If layers and channels are removed, the channels are fitted first and the seams on what they leave.
It is one transfer, since both are the same regression of the same projections.

Hidden channels are read through norms by every projection, the head included, which often shares its weights with the embedding:
nothing is fitted for them. Nor is there a layer to fit before a run that begins with layer 0. A family whose branches pass a norm
before they reach the stream (Gemma 2 and 3, OLMo 2, OPT-350m) is refused, since the stream is not linear in the projection;
mixtures of experts are refused, since a token passes a few of many projections.
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


class Ridge(Transfer):
    """Re-fit the projections beside what is removed by ridge regression."""

    name: ClassVar[str] = "ridge"

    strength: Rate = Field(
        default=0.1,
        description="Weight of the distance to the weights so far, relative to the mean squared activation.",
    )
    windows: Count = Field(
        default=128, description="Calibration windows that are measured on; all of them if there are fewer."
    )

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse families whose last projection does not write the residual stream itself."""
        check_writers(checkpoint, f"regularize.transfer is {self.name}")

    def apply(self, model: PreTrainedModel, windows: Tensor, selection: Selection, *, journal: Journal) -> None:
        """Re-fit the projections that read removed channels, then those before the runs of removed layers, in place."""
        from components.lib.training.refit import fit_seams, refit_channels, streams
        from components.lib.transformer.gates import blocks

        measured = windows[: self.windows]
        targets = streams(model, measured, self.targets(selection))  # of the dense model, before its weights change
        axes = [axis for axis in selection.channels.axes if axis in ("ffn", "heads")]
        total = len(self.targets(selection)) + len(axes) * (len(blocks(model)) - len(selection.removed))
        fitted = iter(range(1, total + 1))

        def done() -> None:
            journal.progress(next(fitted), total)

        refit_channels(model, measured, selection, self.strength, done)
        fit_seams(model, measured, targets, selection, self.strength, done)

    def targets(self, selection: Selection) -> list[int]:
        """Return the layers of the dense model whose streams are asked for: the last of each run that has a layer before it."""
        from components.lib.training.refit import runs_of

        return [last for first, last in runs_of(selection.removed) if first > 0]
