"""Regularize: move the knowledge of the selection to the rest of the model, in closed form and by training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.lib.plugins import module_of
from components.lib.recipe.schema import Recipe
from components.lib.stage.declaration import CHECKPOINT, Job, Stage, reads, reads_windows


@dataclass(frozen=True)
class Inputs:
    """The dense model, the calibration windows and the selection."""

    release: Path = reads(*CHECKPOINT)
    windows: Path = reads_windows()
    selection: Path = reads("selection.json")


def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """Transfer, then train."""
    from components.regularize.regularize import regularize

    regularize(
        inputs.release,
        inputs.windows,
        inputs.selection,
        regularize=recipe.regularize,
        out=job.out,
        journal=job.journal,
        checkpoints=job.checkpoints,
        fetch=job.fetch("windows"),
    )


def _asked(recipe: Recipe, variant: str) -> bool:
    return recipe.regularize.schedule != "none" or recipe.regularize.transfer.chosen is not None


def _transfer(recipe: Recipe) -> tuple[str, ...]:
    transfer = recipe.regularize.transfer.chosen
    return (module_of(type(transfer)),) if transfer else ()


STAGE = Stage(
    "regularize",
    Inputs,
    work,
    sections=("regularize",),
    asked=_asked,
    passes="release",
    resumes=True,
    shared=True,
    leaves_checkpoint=True,
    modules=_transfer,
)
