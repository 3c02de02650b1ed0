"""The report of a run: every number with what it is compared with, as `report.json` and as a page (`page.py`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.lib.depth import Search
from components.lib.provenance.signature import UNSIGNED
from components.lib.recipe.schema import Recipe
from components.lib.report_parts import Part
from components.lib.transformer.removal import Removal, removals
from components.lib.transformer.selection import Selection
from components.register.accuracy import judged_tasks
from components.register.measured import Measured, finite, read_context, read_evaluation
from components.register.verdict import Verdict, judge

CONTROLS = ("pruned-first", "dense-trained")


class Release(BaseModel):
    """The release that was recompressed, pinned."""

    model_config = ConfigDict(frozen=True)

    source: str
    """As the person named it."""
    revision: str | None
    """The commit or version it was pinned to; None if the source has none (a folder)."""
    digest: str
    """sha256 of the snapshot's manifest."""
    changed: tuple[str, ...] = ()
    """What was changed of the source when it was pinned, in words; empty if its tensors are the source's."""


class Registered(BaseModel):
    """The registered version."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str | int
    aliases: tuple[str, ...] = ()
    source: str
    """Where the checkpoint lies."""


class Report(BaseModel):
    """The content of `report.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    release: Release
    recipe: dict[str, Any]
    """Every field with the value that was used, defaults included; `Recipe.model_validate` takes it."""
    selection: Selection
    dense: Measured
    candidate: Measured
    champion: Measured | None
    controls: dict[str, Measured]
    verdict: Verdict
    search: Search | None = None
    """How the depth was found; None if the recipe has no target."""
    registered: Registered | None
    """None if nothing was registered."""
    timing: dict[str, float]
    """Seconds by stage, in the order they ran."""
    environment: dict[str, Any]
    """Library versions, hardware, code version, seed, data digests, context length."""

    def models(self) -> dict[str, Measured]:
        """Every measured model by name: dense and candidate first, then the champion and the controls there are."""
        champion = {"champion": self.champion} if self.champion else {}
        return {"dense": self.dense, "candidate": self.candidate, **champion, **self.controls}

    def judged_tasks(self) -> list[str]:
        """Return the tasks whose accuracy counts in the mean: those that the dense model has an accuracy on."""
        return judged_tasks(self.dense.tasks)

    @property
    def layers(self) -> int:
        """The dense model's number of layers."""
        assert self.dense.layers is not None, "the dense model is of a known family"
        return self.dense.layers

    def removals(self) -> list[Removal]:
        """Return the removal along each axis."""
        return removals(self.selection, self.layers, self.dense.widths)

    def parsed_recipe(self) -> Recipe:
        """Return the recipe as the object that it was written from."""
        return Recipe.model_validate(self.recipe)

    def to_json(self) -> str:
        """Return the report as strict JSON: a number that is not finite is null."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read `report.json`."""
        return cls.model_validate_json(path.read_text())


Curve = list[tuple[int, float]]
"""(step, value), in the order of the steps."""


@dataclass(frozen=True)
class Curves:
    """The records over the steps: drawn on the page, not repeated in `report.json`."""

    parts: list[Part] = field(default_factory=list)
    """The parts of the report that the methods made of the files they left."""
    regularize: dict[str, Curve] = field(default_factory=dict)
    recover: dict[str, Curve] = field(default_factory=dict)


def build(
    *,
    release: Mapping[str, Any],
    recipe: Recipe,
    selection: Path,
    evaluation: Path,
    registered: Mapping[str, Any] | None,
    timing: Mapping[str, float],
    environment: Mapping[str, Any],
    signature: str = UNSIGNED,
) -> Report:
    """Assemble the report, the verdict judged anew from the evaluation.

    Args:
        release: `source`, `revision`, `digest` and `changed`.
        recipe: the recipe of the run.
        selection: the folder of `selection.json`.
        evaluation: the folder of `evaluation.json`.
        registered: `name`, `version`, `aliases` and `source`, or None if nothing is registered.
        timing: seconds by stage.
        environment: library versions, hardware, code version, seed, data digests, context length; JSON values.
        signature: who signed the candidate.

    Raises:
        Refusal: the evaluation lacks the dense model or the candidate.
    """
    models = read_evaluation(evaluation)
    return Report(
        release=Release.model_validate(dict(release)),
        recipe=settings(recipe),
        selection=Selection.load(selection),
        dense=models["dense"],
        candidate=models["candidate"],
        champion=models.get("champion"),
        controls={name: models[name] for name in CONTROLS if name in models},
        verdict=judge(models, recipe, read_context(evaluation), signature),
        search=Search.load(selection),
        registered=Registered.model_validate(dict(registered)) if registered else None,
        timing=dict(timing),
        environment=dict(environment),
    )


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return every field of the recipe with its value; of the methods and transfers, those that are named."""
    settings = recipe.model_dump(mode="json")
    settings["methods"] = recipe.methods.model_dump(mode="json", exclude_none=True)
    settings["regularize"]["transfer"] = recipe.regularize.transfer.model_dump(mode="json", exclude_none=True)
    if recipe.target:
        settings["target"] = recipe.target.model_dump(mode="json", exclude_none=True)
    return settings


def read_curves(
    recipe: Recipe, *, selection: Path, regularize: Path | None = None, recover: Path | None = None
) -> Curves:
    """Read what the stages recorded. A folder or a file that is not there gives no curve: not every method has each.

    Args:
        recipe: the recipe of the run; its methods know the files that they left.
        selection: the folder of the selection.
        regularize: the folder of the training's `metrics.jsonl`.
        recover: the folder of the recovery's `metrics.jsonl`.
    """
    chosen = Selection.load(selection)
    parts = [part for method in recipe.methods.chosen for part in method.parts(chosen, selection)]
    return Curves(parts, _curves(regularize), _curves(recover))


def _curves(folder: Path | None) -> dict[str, Curve]:
    """Turn lines of {"step": 3, "loss": 4.2, "lm": 3.9} into a curve a name. A step told twice keeps its last telling."""
    points: dict[str, dict[int, float]] = {}
    for line in _lines(folder / "metrics.jsonl") if folder else ():
        for name, value in line.items():
            # A stage that was killed and went on from its checkpoint tells some steps a second time.
            if name != "step" and isinstance(value, int | float) and finite(float(value)) is not None:
                points.setdefault(name, {})[line["step"]] = float(value)
    return {name: sorted(curve.items()) for name, curve in points.items()}


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
