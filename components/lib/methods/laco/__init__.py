"""LaCo (arXiv 2402.11187): merge runs of layers into the layer before them, as long as the final state stays similar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from components.lib.methods import BatchSize, LayerMethod
from components.lib.recipe.section import Count
from components.lib.training.journal import Journal
from components.lib.transfers.merge import Merge
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class LaCo(LayerMethod):
    """LaCo: from the last layers to the first, runs that can be merged with the final state still similar."""

    name: ClassVar[str] = "laco"
    title: ClassVar[str] = "LaCo"
    scores = {  # noqa: RUF012
        "distance": "1 − cosine similarity of the final states, with the layer merged into one before it, when last tried"
    }

    merged: Annotated[int, Field(ge=2)] = Field(
        4, description="C, the layers that become one at a time; the last merge may take fewer."
    )
    interval: Count = Field(2, description="I, how far below a merge the next one is tried.")
    threshold: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.65, description="T, the least cosine similarity; it falls as far as the ratio needs."
    )
    samples: Count = Field(10, description="Calibration windows that the similarity is measured on.")
    batch_size: BatchSize = 8

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse a ratio that leaves no layer, and a checkpoint whose layers cannot be added up."""
        super().check(checkpoint)
        Merge().check(checkpoint)

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose the layers that are merged into one before them; layer 0 always stays."""
        from components.lib.methods.laco.work import choose

        return choose(self, model, windows, journal=journal)
