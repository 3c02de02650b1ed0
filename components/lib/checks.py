"""The checks of a release and of the installed programs against a recipe, made once, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from components.lib import vllm
from components.lib.errors import Refusal
from components.lib.recipe.schema import Recipe, Speed
from components.lib.recipe.training import Optimisation
from components.lib.transformer.checkpoint import Checkpoint, PrunableCheckpoint

if TYPE_CHECKING:
    from components.lib.stage.declaration import Stage

_EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""For each dtype of weights, its bits as a number, and those of the exponent."""


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


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise Refusal, which names the tensor, if a weight is NaN or infinite: read once, in pieces."""
    import numpy as np

    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in _EXPONENTS:
            continue
        bits, exponent = _EXPONENTS[tensor.dtype]
        # All bits of the exponent are set in NaN and in infinity, and in no other number.
        if any(((np.frombuffer(piece, bits) & exponent) == exponent).any() for piece in tensor.pieces()):
            raise Refusal(
                f"{tensor.file} holds NaN or infinity in {name}, so that no figure of the model would count: get the release again, or "
                "name an earlier one"
            )


def check_optimizers(stage: Stage[Any], recipe: Recipe, processes: int, parallel: str) -> None:
    """Refuse a training whose weights are to be divided, and whose optimizer has states that cannot be.

    Args:
        stage: the stage that trains.
        recipe: the recipe.
        processes: how many share the training, on all machines together.
        parallel: the value of ESPALIER_PARALLEL.

    Raises:
        Refusal: several processes are to divide the weights (fsdp), and the optimizer has states of 8 bits.
    """
    if processes == 1 or parallel != "fsdp" or not stage.shared:
        return
    scoped = stage.scope(recipe)
    for section in stage.sections:
        settings = getattr(scoped, section)
        if isinstance(settings, Optimisation) and settings.trains and settings.optimizer == "adamw-8bit":
            raise Refusal(
                f"{section}.optimizer is adamw-8bit, and ESPALIER_PARALLEL is fsdp, which divides the states among the {processes} processes "
                f"of {stage.name}; those of 8 bits cannot be divided: set {section}.optimizer to adamw, or ESPALIER_PARALLEL to ddp"
            )


def check_speed(speed: Speed) -> None:
    """Raise Refusal if speed is measured with vLLM, and vLLM is not installed."""
    if speed.enabled and speed.backend == "vllm":
        vllm.installed()
