"""When the gates of a training close. Nothing here imports torch: the report draws what the training does."""

from __future__ import annotations

from components.lib.recipe.training import Regularize


def annealed_part(settings: Regularize, layers: bool) -> float:
    """Return the part of the steps over which the gates fall from 1 to 0.

    Args:
        settings: the recipe's section; its own value comes first.
        layers: whether layers are removed, and not channels alone, whose gates may fall faster (docs/methods.md).
    """
    if settings.anneal is not None:
        return settings.anneal
    if settings.transfer.chosen:
        # The weights are those for the cut model from the first step on: with open gates they would count twice.
        return 0.0
    return 0.15 if layers else 0.05
