"""A comparison as a person makes it: cells side by side, one of them refused, nothing registered, and continued.

The pipeline that a cluster runs is run here by kfp itself.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kfp import local
from mlflow import MlflowClient
from rich.console import Console

from pipeline.compare.cells import load_recipes
from pipeline.compare.pipeline import compare_pipeline
from pipeline.runners.compare import compare as run_cells
from pipeline.runners.local import LocalRunner
from pipeline.runners.runner import CellNews
from pipeline.services.embedded import Services
from tests.e2e.conftest import Bench, Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUICK = ("evaluate.controls=[]", "regularize.schedule=none", "regularize.transfer=ridge")


def recipes(bench: Bench) -> list[str]:
    sleb = bench.recipe.with_name("sleb.yaml")
    sleb.write_text(
        bench.recipe.read_text().replace(
            "{trsp: {ratio: 0.25, steps: 2, batch_size: 4, shortlist: 2}}", "{sleb: {ratio: 0.25}}"
        )
    )
    return [str(bench.recipe), str(sleb)]


def compare(bench: Bench, *more: str) -> Outcome:
    settings = [part for override in QUICK for part in ("--set", override)]
    return bench.espalier("compare", *recipes(bench), "--model", str(bench.release), *settings, *more)


def written(outcome: Outcome) -> dict[str, Any]:
    return json.loads((outcome.folder / "comparison.json").read_text())


@pytest.fixture(scope="module")
def first(bench: Bench) -> Outcome:
    """Two recipes at two ratios: the larger one leaves no layer."""
    return compare(bench, "--ratios", "0.25,0.95")


def test_the_cells_that_can_be_made_are_measured_and_the_others_named(first: Outcome) -> None:
    assert first.status == 1, first.told
    cells = {(cell["recipe"], cell["ratio"]): cell for cell in written(first)["cells"]}
    assert {key: cell["state"] for key, cell in cells.items()} == {
        ("recipe", 0.25): "done",
        ("sleb", 0.25): "done",
        ("recipe", 0.95): "failed",
        ("sleb", 0.95): "failed",
    }
    assert cells["sleb", 0.95]["reason"].startswith("methods.sleb.ratio 0.95 removes 8 of the model's 8 layers")
    assert "sleb at 0.95 failed: methods.sleb.ratio 0.95" in " ".join(first.printed.split())
    assert cells["sleb", 0.25]["models"]["candidate"]["layers"] == 6


def test_the_files_show_both_recipes_beside_the_dense_model(first: Outcome) -> None:
    page, table, data = map(Path, first.printed.splitlines()[-3:])
    assert page.read_text().startswith("<!doctype html>")
    models = [(line["recipe"], line["model"]) for line in csv.DictReader(table.open())]
    assert ("sleb", "candidate") in models
    assert data.name == "comparison.json"
    rows = [(row["recipe"], row["model"], row["done"]) for row in written(first)["rows"]]
    assert rows == [
        ("", "dense", 2),
        ("recipe", "candidate", 1),
        ("recipe", "candidate", 0),
        ("sleb", "candidate", 1),
        ("sleb", "candidate", 0),
    ]


def test_nothing_is_registered(bench: Bench, first: Outcome) -> None:
    address = Services(bench.home).up()["MLFLOW_TRACKING_URI"]
    assert MlflowClient(address, address).search_registered_models() == []


def test_a_cell_whose_report_is_there_is_not_run_again(bench: Bench, first: Outcome) -> None:
    again = compare(bench, "--ratios", "0.25")
    assert again.status == 0, again.told
    assert "2 of 2 cells were measured before" in again.printed
    before = {cell["run"]: cell["models"] for cell in written(first)["cells"]}
    assert all(before[cell["run"]] == cell["models"] for cell in written(again)["cells"])


@dataclass(frozen=True)
class WithKfp(LocalRunner):
    """Runs the pipeline that a cluster runs, with kfp itself."""

    root: Path = Path()

    def run_cells(self, label: str, release: str, recipes: Mapping[str, str], console: Console) -> Iterator[CellNews]:
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(self.root))
        cells = [{"recipe": recipe, "run": run} for run, recipe in recipes.items()]
        compare_pipeline(at_most=2)(release=release, cells=cells)
        return (CellNews(run) for run in recipes)


def test_the_pipeline_of_a_cluster_measures_the_cells_that_this_machine_would(bench: Bench, tmp_path: Path) -> None:
    loaded = load_recipes(recipes(bench), QUICK)
    console = Console(file=io.StringIO())
    made = run_cells(loaded, str(bench.release), [0.5], [], bench.home, console, "", WithKfp(tmp_path / "root"))
    assert {cell.recipe: cell.models["candidate"].layers for cell in made.comparison.cells} == {"recipe": 4, "sleb": 4}
    here = compare(bench, "--ratios", "0.5")
    assert here.status == 0, here.told
    assert "2 of 2 cells were measured before" in here.printed
    assert written(here)["cells"] == made.comparison.model_dump(mode="json")["cells"]
