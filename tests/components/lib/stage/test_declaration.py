"""A stage is declared once: the face, the scope of the recipe and the files it reads follow from the declaration."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.recipe.training import Regularize
from components.lib.stage.code import ROOT
from components.lib.stage.declaration import MODEL, TOKENIZER, declared_stages, read_files
from components.lib.store.artifacts import File, Manifest

STAGES = declared_stages()

RECIPE = """
methods: {sleb: {ratio: 0.25}}
calibration: {data: train.txt}
regularize: {steps: 7, schedule: penalty, strength: 3}
evaluate: {perplexity: {test: test.txt}, controls: [pruned-first]}
"""


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe(RECIPE)


def test_every_folder_with_a_declaration_has_a_face_of_its_name() -> None:
    faces = {path.parent.name for path in (ROOT / "components").glob("*/component.py")}
    assert set(STAGES) <= faces
    assert {name: stage.name for name, stage in STAGES.items()} == {name: name for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_the_face_takes_the_inputs_that_the_work_reads(name: str) -> None:
    face = importlib.import_module(f"components.{name}.component")
    taken = set(getattr(face, name).component_spec.inputs) - {"recipe", "run", "kind"}
    completed = {"calibrate": {"text"}, "evaluate": {"texts", "tasks"}}.get(name, set())
    assert taken | completed == {one.name for one in fields(STAGES[name].inputs)}


@pytest.mark.parametrize("name", STAGES)
def test_the_declaration_imports_nothing_heavy_at_the_top(name: str) -> None:
    source = inspect.getsource(importlib.import_module(f"components.{name}.stage"))
    assert not [
        line for line in source.splitlines() if line.startswith(("import torch", "from torch", "from transformers"))
    ]


class TestTheScope:
    def test_holds_the_declared_sections_alone(self, recipe: Recipe) -> None:
        scoped = STAGES["lora_rft"].scope(recipe)
        assert scoped.recover == recipe.recover
        for section in ("methods", "calibration", "regularize", "evaluate", "promote"):
            with pytest.raises(AttributeError):
                getattr(scoped, section)

    def test_shows_defaults_for_fields_that_the_output_does_not_depend_on(self, recipe: Recipe) -> None:
        seen = STAGES["control"].scope(recipe).regularize
        default = Regularize()
        assert seen.steps == 7
        assert (seen.schedule, seen.strength) == (default.schedule, default.strength)
        assert STAGES["regularize"].scope(recipe).regularize == recipe.regularize


class TestWhetherTheRecipeAsks:
    def test_for_a_control_by_its_kind(self, recipe: Recipe) -> None:
        control = STAGES["control"]
        assert control.asked(recipe, "pruned-first")
        assert not control.asked(recipe, "dense-trained")

    def test_for_regularize_by_its_schedule_or_its_transfer(self, recipe: Recipe) -> None:
        asked = STAGES["regularize"].asked
        assert asked(recipe, "")
        none = parse_recipe(RECIPE, ["regularize.schedule=none", "evaluate.controls=[]"])
        assert not asked(none, "")
        moved = parse_recipe(RECIPE, ["regularize.schedule=none", "evaluate.controls=[]", "regularize.transfer=scale"])
        assert asked(moved, "")


class TestTheFilesThatAreRead:
    MANIFEST = Manifest(
        files=tuple(
            File(name=name, size=1, sha256="0" * 64)
            for name in (
                "model/README.md",
                "model/LICENSE",
                "model/config.json",
                "model/model.safetensors",
                "model/tokenizer.json",
                "verification.json",
            )
        )
    )

    def names(self, *patterns: str) -> set[str]:
        return {file.name for file in read_files(self.MANIFEST, patterns).files}

    def test_are_named_by_wildcards_and_excluded_by_an_exclamation_mark(self) -> None:
        assert self.names("model/*", "!model/README.md") == {
            "model/LICENSE",
            "model/config.json",
            "model/model.safetensors",
            "model/tokenizer.json",
        }
        assert self.names(*MODEL) == {"model/config.json", "model/model.safetensors", "model/tokenizer.json"}
        assert self.names(*TOKENIZER) == {"model/config.json", "model/tokenizer.json"}

    def test_may_be_none(self) -> None:
        assert self.names("model/NOTICE") == set()


def test_the_works_of_all_stages_are_found_by_path() -> None:
    assert all((Path(ROOT) / "components" / name / "stage.py").is_file() for name in STAGES)
