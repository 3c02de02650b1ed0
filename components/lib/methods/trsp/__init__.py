"""TRSP (arXiv 2505.18232): learn one gate a layer, and remove the layers that need theirs the least."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from components.lib.methods import BatchSize, LayerMethod
from components.lib.recipe.section import Count, Rate, Weight
from components.lib.report_parts import Part
from components.lib.training.journal import Journal
from components.lib.transfers import check_writers
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Trsp(LayerMethod):
    """TRSP's first regularisation: learn one gate a layer, the weights frozen, and remove the layers of small gates."""

    name: ClassVar[str] = "trsp"
    title: ClassVar[str] = "TRSP"
    scores = {  # noqa: RUF012  # a class variable of the base
        "gate": "the layer's gate, when the layer was removed or at the end",
        "perplexity": "perplexity on the calibration text without the layer, when last measured",
        "divergence": "divergence from the dense model, nats a token, without the layer and re-fitted, when last measured",
    }

    strategy: Literal["iterative", "one-shot"] = Field(
        "iterative",
        description="Remove one layer a round and continue to learn the other gates, or learn once and remove the smallest.",
    )
    placement: Literal["branch", "output"] = Field(
        "branch",
        description="Gate the branch of the layer, x + g·(f(x) − x), or its whole output, g·f(x), as the paper does.",
    )
    strength: Weight = Field(0.1, description="λ1, the weight of Σ|g|.")
    steps: Count = Field(12, description="Optimizer steps a round (one-shot: steps × the number of layers to remove).")
    batch_size: BatchSize = 8
    learning_rate: Rate = Field(0.05, description="Adam's learning rate for the gates.")
    shortlist: Annotated[int, Field(ge=0)] = Field(
        4,
        description="How many layers of the smallest gates are measured without each; the cheapest is removed. 0 uses the gates alone, as the paper does.",
    )
    measure: Literal["cut", "fitted"] = Field(
        "cut",
        description="Measure the shortlist by the perplexity of the plain cut, or, as seam does, by the divergence after the transfer ridge.",
    )
    seed: int = Field(0, description="Seed of the batches' order.")

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse a ratio that leaves no layer, and families that no transfer can be fitted to if that is what is measured."""
        super().check(checkpoint)
        if self.measure == "fitted":
            check_writers(checkpoint, f"methods.{self.name}.measure is fitted", "use cut")

    def parts(self, selection: Selection, folder: Path) -> Sequence[Part]:
        """Show the gates while they were learned."""
        from components.lib.methods.trsp.report import gates, read_trajectory

        rounds = read_trajectory(folder)
        return [gates(rounds, selection.removed)] if rounds else []

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose layers by their gates, and leave `trajectory.jsonl` and `gates.svg` in `out`."""
        from components.lib.methods.trsp.work import choose

        return choose(self, model, windows, journal=journal, out=out)
