"""The schedule of the gates during a training. Nothing here imports torch, because the report draws the schedule too."""

from __future__ import annotations

from components.lib.recipe.training import Regularize


def annealed_part(settings: Regularize, layers: bool) -> float:
    """Return the part of the steps over which the gates fall from 1 to 0.

    Args:
        settings: the recipe's section; its `anneal` takes precedence.
        layers: whether layers are removed; the gates of channels alone may fall faster (docs/methods.md).
    """
    if settings.anneal is not None:
        return settings.anneal
    if settings.transfer.chosen:
        # The transfer fitted the weights to the cut model, so an open gate would count the removed parts twice.
        return 0.0
    return 0.15 if layers else 0.05
