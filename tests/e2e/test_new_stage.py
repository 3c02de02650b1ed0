"""A new stage is its own folder and its lines in `pipeline/recompress.py`: nothing else of the product changes for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.lib.stage.code import ROOT
from components.lib.store.store import Reference, Store
from pipeline.services.embedded import Services
from tests.e2e.conftest import Bench, Outcome, environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

DECLARATION = '''
"""Count zeros: how many weights of the pruned model are exactly 0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.lib.recipe.schema import Recipe
from components.lib.stage.declaration import MODEL, Job, Stage, reads


@dataclass(frozen=True)
class Inputs:
    """The pruned model."""

    model: Path = reads(*MODEL)


def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """Count."""
    import json

    from safetensors.torch import load_file

    weights = load_file(inputs.model / "model" / "model.safetensors")
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    (job.out / "zeros.json").write_text(json.dumps({"zeros": zeros}))


STAGE = Stage("count_zeros", Inputs, work)
'''

FACE = '''
"""The Kubeflow face of count_zeros."""

from components.lib.stage.face import component


@component
def count_zeros(model: str, recipe: str, run: str) -> str:
    """Count the weights that are 0."""
    from components.count_zeros.stage import STAGE

    return STAGE.run(run, recipe, model=model)
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the product with one more stage."""
    for package in ("components", "pipeline"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "components" / "count_zeros"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "stage.py").write_text(DECLARATION)
    (folder / "component.py").write_text(FACE)
    front = tmp_path / "pipeline" / "recompress.py"
    text = front.read_text()
    for before, after in (
        (
            "from components.calibrate.component import calibrate\n",
            "from components.calibrate.component import calibrate\n"
            "from components.count_zeros.component import count_zeros\n",
        ),
        ("        models = {\n", "        zeros = count_zeros(model=pruned, **shared).output\n\n        models = {\n"),
        ('            "pruned": pruned,\n', '            "pruned": pruned,\n            "zeros": zeros,\n'),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    front.write_text(text)
    return tmp_path


def espalier(tree: Path, *arguments: str) -> Outcome:
    """Run the copied product's command line."""
    variables = environment() | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pipeline.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tree)
    return Outcome(done.returncode, done.stdout.strip(), done.stderr)


def test_a_new_stage_runs_is_reported_and_is_explained(
    bench: Bench, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("methods={shortgpt: {ratio: 0.25}}", "evaluate.controls=[]", "evaluate.speed.enabled=false")
    asked = [*bench.run_arguments("zeros", overrides), "--home", str(bench.home)]
    outcome = espalier(tree, *asked)
    assert outcome.status == 0, outcome.told
    assert "count_zeros" in outcome.stages("done")
    assert outcome.report["timing"]["count_zeros"] >= 0

    for name, value in Services(bench.home).up().items():
        monkeypatch.setenv(name, value)
    store = Store.from_environment()
    [prefix] = store.newest("stages/count_zeros")
    found = store.find(prefix)
    assert found is not None
    left = store.get(Reference.parse(str(found)), tmp_path / "zeros")
    assert json.loads((left / "zeros.json").read_text())["zeros"] >= 0

    why = espalier(tree, "why", *asked[1:])
    assert why.status == 0, why.told
    [line] = [line for line in why.printed.splitlines() if line.startswith("count-zeros")]
    assert line.split() == ["count-zeros", "made"]
