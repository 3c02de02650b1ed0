"""The transfers: each moves what the removed parts know into the weights that stay. One file each, with its equation and source."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from components.lib.errors import Refusal
from components.lib.plugins import classes_of
from components.lib.recipe.section import Section
from components.lib.training.journal import Journal
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.family import Family
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Transfer(Section):
    """A transfer: its settings are its fields, and `apply` changes the full-size model before the selection is removed.

    Nothing here imports torch, so that a recipe is read quickly; the work imports it where it starts.
    """

    name: ClassVar[str]
    """The transfer's name in a recipe."""

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse, before any work, a checkpoint whose blocks do not allow the transfer.

        Raises:
            Refusal: the family is one that the transfer's equation does not hold for.
        """

    def apply(self, model: PreTrainedModel, windows: Tensor, selection: Selection, *, journal: Journal) -> None:
        """Change weights of the full-size `model` in place, for the model without the selection.

        Args:
            model: the dense model, in evaluation mode; its shapes and its config stay.
            windows: token ids (windows, length) to measure on.
            selection: the layers and channels that will be removed. Their own weights are left alone.
            journal: takes progress.
        """
        raise NotImplementedError


def check_writers(checkpoint: PrunableCheckpoint, asked: str, cure: str = "use reconstruct, merge or none") -> None:
    """Refuse a family whose blocks do not add a projection's output to the residual stream as it is.

    Args:
        checkpoint: the release.
        asked: the field and its value that ask for it, for the refusal.
        cure: what to do instead.

    Raises:
        Refusal: as `why_not_fitted` says.
    """
    reason = why_not_fitted(checkpoint.family, checkpoint.config)
    if reason:
        raise Refusal(f"{asked}, but {checkpoint.family.title} {reason}: {cure}")


def why_not_fitted(family: Family, config: Mapping[str, Any]) -> str | None:
    """Return why no projection of the family can be fitted to the residual stream; None if it can.

    A mixture of experts has no layout, and the branches of some families pass a norm before the stream.
    """
    if family.layout is None:
        return "has no layout of the projections that write the residual stream"
    if family.layout.norms_after(config):
        return "has norms between its projections and the residual stream"
    return None


@cache
def known_transfers() -> dict[str, type[Transfer]]:
    """Return every transfer's class by its name in a recipe, sorted by name."""
    return classes_of(__name__, Path(__file__).parent, Transfer)
