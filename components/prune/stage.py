"""Prune: cut the selection, export, verify, and write the model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.lib.recipe.schema import Recipe
from components.lib.stage.declaration import Job, Stage, reads


@dataclass(frozen=True)
class Inputs:
    """The release's model card and the names of its tensors, the regularised model and the selection."""

    release: Path = reads("model/README.md", "model/*.json", "model/*.safetensors", headers=True)
    model: Path = reads("model/*")
    selection: Path = reads("selection.json", "choice.json")


def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """Cut and verify."""
    from components.prune.prune import prune

    release = job.manifests["release"]
    prune(
        inputs.release,
        inputs.model,
        inputs.selection,
        lineage={**release.metadata, "digest": release.digest},
        made_by={
            "methods": recipe.methods.model_dump(mode="json", exclude_none=True),
            **({"target": recipe.target.model_dump(mode="json", exclude_none=True)} if recipe.target else {}),
            "calibration": recipe.calibration.model_dump(mode="json"),
            "regularize": recipe.regularize.model_dump(mode="json")
            | {"transfer": recipe.regularize.transfer.model_dump(mode="json", exclude_none=True)},
        },
        out=job.out,
        journal=job.journal,
    )


STAGE = Stage(
    "prune", Inputs, work, sections=("methods", "target", "calibration", "regularize"), leaves_checkpoint=True
)
