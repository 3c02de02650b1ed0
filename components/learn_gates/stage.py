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
    """Choose as much as the ratios say, or search how much the target allows."""
    if recipe.target:
        from components.learn_gates.search import search

        search(
            inputs.release,
            inputs.windows,
            methods=recipe.methods.chosen,
            target=recipe.target,
            out=job.out,
            journal=job.journal,
        )
        return
    from components.learn_gates.choose import choose

    choose(inputs.release, inputs.windows, methods=recipe.methods.chosen, out=job.out, journal=job.journal)


def _named(recipe: Recipe) -> tuple[str, ...]:
    transfer = recipe.target.transfer.chosen if recipe.target else None
    return tuple(module_of(type(one)) for one in (*recipe.methods.chosen, *([transfer] if transfer else [])))


def _unused(recipe: Recipe) -> tuple[str, ...]:
    return () if recipe.target else ("components.learn_gates.search",)


STAGE = Stage("learn_gates", Inputs, work, sections=("methods", "target"), modules=_named, unused=_unused)
