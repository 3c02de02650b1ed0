"""A comparison as a person makes it: cells side by side, one of them refused, nothing registered, and continued."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.services.embedded import Services
from tests.e2e.conftest import Bench, Outcome

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUICK = ("evaluate.controls=[]", "regularize.schedule=none", "regularize.transfer=ridge")


def compare(bench: Bench, *more: str) -> Outcome:
    sleb = bench.recipe.with_name("sleb.yaml")
    sleb.write_text(
        bench.recipe.read_text().replace(
            "{trsp: {ratio: 0.25, steps: 2, batch_size: 4, shortlist: 2}}", "{sleb: {ratio: 0.25}}"
        )
    )
    settings = [part for override in QUICK for part in ("--set", override)]
    return bench.espalier("compare", str(bench.recipe), str(sleb), "--model", str(bench.release), *settings, *more)


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
