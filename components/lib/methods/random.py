"""Layers drawn at random: what a method has to beat to have said anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from components.lib.methods import LayerMethod
from components.lib.training.journal import Journal
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Random(LayerMethod):
    """Layers drawn at random from a seed."""

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random layers"

    seed: int = Field(0, description="Seed of the draw.")

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Draw as many layers as the ratio asks for, each that can be removed as likely as any other."""
        import torch

        from components.lib.transformer.gates import blocks, removable

        layers = len(blocks(model))
        shuffled = torch.randperm(layers, generator=torch.Generator().manual_seed(self.seed)).tolist()
        free = set(removable(model))
        drawn = [layer for layer in shuffled if layer in free]
        return Selection.of_layers(self.name, drawn[: self.count(layers)])
