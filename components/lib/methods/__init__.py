"""The methods that choose what is removed: one file each, with a function `choose` of the type below."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from components.lib.recipe.schema import Dress, Gates, Target
from components.lib.training.journal import Journal
from components.lib.transformer.checkpoint import layers_to_remove
from components.lib.transformer.gates import blocks
from components.lib.transformer.selection import NOTHING, Selection


@dataclass(frozen=True)
class Task:
    """What a method is asked for: the recipe's sections, and what the method before it chose."""

    target: Target
    gates: Gates = field(default_factory=Gates)
    dress: Dress = field(default_factory=Dress)
    before: Selection = NOTHING

    def layers(self, model: PreTrainedModel) -> int:
        """Return how many layers go. Raises Refusal where none would stay."""
        return layers_to_remove(self.target.ratio, len(blocks(model)))


MEASURED_TOKENS = 32_768
"""Tokens on which what would go is measured: the same for each, so that differences show long before values settle."""


def sample(windows: Tensor) -> Tensor:
    """Return as many of the windows (windows, length) as hold MEASURED_TOKENS, at least one."""
    # They were drawn in random order, so that the first of them are a fair sample.
    return windows[: max(1, MEASURED_TOKENS // windows.shape[1])]


class Choose(Protocol):
    """What every method's `choose` is."""

    def __call__(
        self, model: PreTrainedModel, windows: Tensor, task: Task, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose what of the model is removed.

        Args:
            model: the dense model, left as it was.
            windows: token ids (windows, length) to judge by.
            task: how much goes, and how to choose it; a method without gates takes the batch size of that section alone.
            journal: takes curves and progress.
            out: an existing folder for what the method leaves beside its choice; None leaves nothing.
        """


def load(name: str) -> Choose:
    """Return the `choose` of a method by its name in the recipe, one of `components.lib.recipe.schema.methods()`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").choose
