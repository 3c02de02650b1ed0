"""LoRA-RFT: fine-tune the pruned model with low-rank adapters, merged at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.lib.recipe.schema import Recipe
from components.lib.stage.declaration import Job, Stage, reads, reads_windows


@dataclass(frozen=True)
class Inputs:
    """The pruned model and the calibration windows."""

    model: Path = reads("model/*")
    windows: Path = reads_windows()


def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """Fine-tune."""
    from components.lora_rft.lora_rft import lora_rft

    lora_rft(
        inputs.model,
        inputs.windows,
        recover=recipe.recover,
        out=job.out,
        journal=job.journal,
        checkpoints=job.checkpoints,
        fetch=job.fetch("windows"),
    )


def _asked(recipe: Recipe, variant: str) -> bool:
    return recipe.recover.enabled


STAGE = Stage(
    "lora_rft",
    Inputs,
    work,
    sections=("recover",),
    asked=_asked,
    passes="model",
    resumes=True,
    shared=True,
    leaves_checkpoint=True,
)
