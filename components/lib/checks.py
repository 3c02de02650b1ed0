"""The checks of a release and of the installed programs against a recipe, made once, before any work."""

from __future__ import annotations

from components.lib import vllm
from components.lib.errors import Refusal
from components.lib.recipe.schema import Recipe, Speed
from components.lib.transformer.checkpoint import PrunableCheckpoint


def check_release(checkpoint: PrunableCheckpoint, recipe: Recipe) -> None:
    """Refuse a checkpoint that the recipe cannot be applied to.

    Raises:
        Refusal: a method cannot remove the asked layers or channels, the transfer does not support the family, or the model
            reads fewer tokens than the recipe asks for.
    """
    for method in recipe.methods.chosen:
        method.check(checkpoint)
    if recipe.regularize.transfer.chosen:
        recipe.regularize.transfer.chosen.check(checkpoint)
    most = checkpoint.longest_context
    for field, length in recipe.lengths().items():
        if most is not None and length > most:
            raise Refusal(f"{field} is {length}, and the model reads {most} tokens at most: set it to {most} or less")


def check_speed(speed: Speed) -> None:
    """Raise Refusal if speed is measured with vLLM, and vLLM is not installed."""
    if speed.enabled and speed.backend == "vllm":
        vllm.installed()
