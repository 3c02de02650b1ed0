"""The last layers but one: a baseline that looks at nothing (arXiv 2403.17887)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from components.lib.methods import LayerMethod
from components.lib.training.journal import Journal
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Last(LayerMethod):
    """The deepest layers, but for the very last one, which always stays."""

    name: ClassVar[str] = "last"
    title: ClassVar[str] = "Last layers"

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose as many of the deepest layers as the ratio asks for, the deepest first. The last one is needed by the head, and stays."""
        from components.lib.transformer.gates import blocks, removable

        layers = len(blocks(model))
        deepest = [layer for layer in reversed(removable(model)) if layer < layers - 1]
        return Selection.of_layers(self.name, deepest[: self.count(layers)])
