"""Learn gates: choose the layers and channels to remove by the recipe's methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.lib.plugins import module_of
from components.lib.recipe.schema import Recipe
from components.lib.stage.declaration import MODEL, Job, Stage, reads


@dataclass(frozen=True)
class Inputs:
    """The dense model and the calibration windows."""

    release: Path = reads(*MODEL)
    windows: Path = reads("windows.safetensors")


def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """Choose."""
    from components.learn_gates.choose import choose

    choose(inputs.release, inputs.windows, methods=recipe.methods.chosen, out=job.out, journal=job.journal)


def _methods(recipe: Recipe) -> tuple[str, ...]:
    return tuple(module_of(type(method)) for method in recipe.methods.chosen)


STAGE = Stage("learn_gates", Inputs, work, sections=("methods",), modules=_methods)
