"""Control: the same training without the regularisation, or without the cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.lib.recipe.schema import Recipe
from components.lib.stage.declaration import CHECKPOINT, Job, Stage, reads, reads_windows


@dataclass(frozen=True)
class Inputs:
    """The dense model, the calibration windows and the selection."""

    release: Path = reads(*CHECKPOINT)
    windows: Path = reads_windows()
    selection: Path = reads("selection.json")


def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """Train the control that the variant names."""
    from components.control.control import control

    control(
        inputs.release,
        inputs.windows,
        inputs.selection,
        kind=job.variant,
        regularize=recipe.regularize,
        recover=recipe.recover,
        out=job.out,
        journal=job.journal,
        checkpoints=job.checkpoints,
        fetch=job.fetch("windows"),
    )


def _asked(recipe: Recipe, variant: str) -> bool:
    return variant in recipe.evaluate.controls


STAGE = Stage(
    "control",
    Inputs,
    work,
    sections=("regularize", "recover"),
    without=tuple(f"regularize.{field}" for field in ("transfer", "schedule", "anneal", "norm", "strength", "ramp")),
    asked=_asked,
    resumes=True,
    shared=True,
    leaves_checkpoint=True,
)
