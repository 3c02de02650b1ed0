"""The methods that choose what is removed: one file each, with a function `choose` of the type below."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from components.recipe import Gates
from components.training.journal import Journal
from components.transformer.selection import Selection


class Choose(Protocol):
    """What every method's `choose` is."""

    def __call__(
        self, model: PreTrainedModel, windows: Tensor, count: int, gates: Gates, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose `count` layers of the model to remove.

        Args:
            model: the dense model, left as it was.
            windows: token ids (windows, length) to judge by.
            count: how many layers go, fewer than the model has.
            gates: the recipe's section; a method without gates takes its batch size alone.
            journal: takes curves and progress.
            out: an existing folder for what the method leaves beside its choice; None leaves nothing.
        """


def load(name: str) -> Choose:
    """Return the `choose` of a method by its name in the recipe, one of `components.recipe.methods()`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").choose
