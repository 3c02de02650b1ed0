"""Calibrate: draw the windows of text on which layers and channels are chosen and models are trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.lib.recipe.schema import Recipe
from components.lib.stage.declaration import TOKENIZER, Job, References, Stage, reads


@dataclass(frozen=True)
class Inputs:
    """The release's tokenizer and the calibration text."""

    release: Path = reads(*TOKENIZER)
    text: Path = reads()


def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """Draw the windows."""
    from components.calibrate.windows import calibrate

    calibrate(
        inputs.release,
        inputs.text,
        calibration=recipe.calibration,
        out=job.out,
        journal=job.journal,
        send=job.send,
    )


def _with_text(given: References, recipe: Recipe) -> References:
    return {**given, "text": recipe.calibration.data.path or ""}


STAGE = Stage("calibrate", Inputs, work, sections=("calibration",), complete=_with_text)
