"""Choose runs of neighbouring layers by the divergence after re-fitting the projection before each run (transfer ridge).

`components.lib.training.seam` has the search: one pass that records the streams, the cost of every run in nats a token, the cheapest
sets of runs by dynamic programming, and a measurement of the first few that differ enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from components.lib.methods import BatchSize, LayerMethod
from components.lib.recipe.section import Count, Rate
from components.lib.training.journal import Journal
from components.lib.transfers import check_writers
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Seam(LayerMethod):
    """Seam: runs of layers, by the divergence that remains after the transfer ridge, from one forward pass."""

    name: ClassVar[str] = "seam"
    title: ClassVar[str] = "Seam"
    scores = {  # noqa: RUF012
        "divergence": "divergence from the dense model, nats a token, with the cheapest run that holds the layer removed and re-fitted"
    }

    strength: Rate = Field(default=0.1, description="Strength of the ridge regression, as the transfer ridge has it.")
    longest: Count = Field(
        default=8, description="The longest run that is compared; longer ones if the ratio needs them."
    )
    shortlist: int = Field(
        default=6,
        ge=0,
        description="Sets of runs, each unlike the others, that are measured whole; 0 takes the one of least summed cost.",
    )
    fit_tokens: Count = Field(default=4096, description="Calibration tokens that the runs are fitted on.")
    measure_tokens: Count = Field(
        default=2048,
        description="Other calibration tokens that the divergence is measured on; in a quarter of them, some are replaced at random.",
    )

    batch_size: BatchSize = 8

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse a ratio that leaves no layer, and families that the transfer ridge does not hold for."""
        super().check(checkpoint)
        check_writers(checkpoint, f"methods names {self.name}", "use trsp")

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose runs of layers; layer 0 always stays.

        `scores["divergence"]` is, for each layer, the cost of the cheapest run that holds it; for layer 0, which is in none, the largest.
        """
        from components.lib.training.seam import choose_runs
        from components.lib.transformer.gates import blocks

        layers = len(blocks(model))
        removed, runs = choose_runs(
            model,
            windows,
            self.count(layers),
            journal=journal,
            strength=self.strength,
            longest=self.longest,
            shortlist=self.shortlist,
            fit_tokens=self.fit_tokens,
            measure_tokens=self.measure_tokens,
            batch_size=self.batch_size,
        )
        largest = max(run.divergence for run in runs)
        costs = [
            min((run.divergence for run in runs if run.first <= layer <= run.last), default=largest)
            for layer in range(layers)
        ]
        order = sorted(removed, key=costs.__getitem__)
        return Selection.of_layers(self.name, order, {"divergence": tuple(costs)})
