"""The code of a key: it changes with what computes an output, and with nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.stage import code
from components.lib.stage.declaration import declared_stages

RECIPE = """
methods: {sleb: {ratio: 0.25}}
calibration: {data: train.txt}
evaluate: {perplexity: {test: test.txt}}
"""

DIGESTS = """
import json, sys
from components.lib.recipe.loading import parse_recipe
from components.lib.stage.declaration import declared_stages
recipe = parse_recipe(sys.argv[1])
print(json.dumps({name: stage.code(recipe).digest for name, stage in declared_stages().items()}))
"""

Digests = Callable[[], dict[str, str]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package `components`."""
    shutil.copytree(code.ROOT / "components", tmp_path / "components", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def digests(tree: Path) -> Digests:
    """The code of each stage in the copied tree."""

    def read() -> dict[str, str]:
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS, RECIPE],
            env=environment,
            cwd=tree,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    return read


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


class TestTheCode:
    def test_is_the_same_after_edits_that_compute_nothing(self, tree: Path, digests: Digests) -> None:
        before = digests()
        lib = tree / "components" / "lib"
        edit(lib / "methods/sleb.py", '"""Choose greedily', '"""Search greedily')
        edit(lib / "methods/sleb.py", "        read = 0\n", "        read = 0  # tokens so far\n\n")
        edit(lib / "store/store.py", "class Store:\n", "class Store:\n    colour = 'blue'\n\n")
        edit(lib / "training/journal.py", "class Silent:\n", "class Silent:\n    colour = 'blue'\n\n")
        for module in (lib / "tracking").glob("*.py"):
            module.write_text(module.read_text() + "\nANOTHER = 1\n")
        face = tree / "components/prune/component.py"
        face.write_text(face.read_text().replace("Cut the selection", "Remove the selection"))
        assert digests() == before

    def test_of_a_method_changes_the_choice_alone(self, tree: Path, digests: Digests) -> None:
        before = digests()
        edit(tree / "components/lib/methods/sleb.py", "        read = 0\n", "        read = -1\n")
        assert changed(before, digests()) == {"learn_gates"}

    def test_of_a_method_that_the_recipe_does_not_name_changes_nothing(self, tree: Path, digests: Digests) -> None:
        before = digests()
        edit(tree / "components/lib/methods/shortgpt.py", "read = 0\n", "read = -1\n")
        edit(
            tree / "components/lib/methods/trsp/work.py", "self.order: list[int] = []", "self.order: list[int] = list()"
        )
        assert digests() == before

    def test_of_the_training_changes_the_stages_that_train(self, tree: Path, digests: Digests) -> None:
        before = digests()
        edit(tree / "components/lib/training/penalty.py", "return 1.0 - ramped", "return 0.9 - ramped")
        assert changed(before, digests()) == {"regularize", "control"}

    def test_of_the_model_card_changes_prune_alone(self, tree: Path, digests: Digests) -> None:
        before = digests()
        edit(tree / "components/prune/card.md.j2", "## Lineage", "## Origin")
        assert changed(before, digests()) == {"prune"}

    def test_of_the_declaration_is_not_a_part_of_it(self, tree: Path, digests: Digests) -> None:
        before = digests()
        edit(tree / "components/prune/stage.py", "leaves_checkpoint=True", "leaves_checkpoint=False")
        assert digests() == before


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


class TestTheLibraries:
    @pytest.fixture
    def recipe(self) -> Recipe:
        return parse_recipe(RECIPE)

    def test_are_those_that_make_the_numbers(self, recipe: Recipe) -> None:
        found = {name: set(stage.code(recipe).libraries) for name, stage in declared_stages().items()}
        assert {"torch", "transformers"} <= found["learn_gates"]
        assert {"torch", "peft"} <= found["regularize"]
        assert all(not libraries & {"mlflow", "boto3", "kfp", "matplotlib"} for libraries in found.values())

    def test_count_lm_eval_only_for_tasks(self, recipe: Recipe) -> None:
        evaluate = declared_stages()["evaluate"]
        assert "lm_eval" not in evaluate.code(recipe).libraries
        for asked in ("tasks=[piqa]", "continuations=50"):
            assert "lm_eval" in evaluate.code(parse_recipe(RECIPE, [f"evaluate.{asked}"])).libraries

    def test_count_by_their_version_and_not_by_their_build(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(code, "version", lambda library: "9.9.0+cu130")
        assert set(code.code_of("prune").libraries.values()) == {"9.9.0"}


def test_an_unused_module_and_what_it_alone_imports_do_not_count() -> None:
    everything = code.code_of("evaluate").modules
    without = code.code_of("evaluate", without=("components.evaluate.speed",)).modules
    assert set(everything) - set(without) == {"components.evaluate.speed"}


def test_every_stage_can_be_hashed_whatever_the_recipe_names() -> None:
    assert len(code.code_of_everything()) == 64
