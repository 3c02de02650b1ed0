"""A comparison on a cluster: the page is made of the reports in the store, as on this machine.

`tests/e2e/test_compare.py` makes one on this machine.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from kfp_server_api import V2beta1Run
from mlflow import MlflowClient
from rich.console import Console

from components.lib.errors import Unavailable
from components.lib.recipe.loading import parse_recipe
from components.lib.store.runs import leave_end, leave_failure, leave_stage
from components.lib.store.store import Store
from pipeline.runners.compare import Compared, compare
from pipeline.runners.kubeflow import KubeflowRunner
from tests.components.lib.transformer import zoo
from tests.pipeline.kubeflow.server import KubeflowServer
from tests.pipeline.runners.conftest import leave_report

RECIPE = """
methods: {METHOD: {ratio: 0.25}}
calibration: {data: TEXT, samples: 4, length: 32}
evaluate: {perplexity: {test: TEXT}, speed: {enabled: false}, controls: []}
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.release(zoo.SPECIMENS[0].model(layers=4), tmp_path_factory.mktemp("release"))


@pytest.fixture
def compared(on_cluster: KubeflowRunner, release: Path, tmp_path: Path, shown: Console) -> Callable[..., Compared]:
    """Compare trsp and sleb on the cluster."""
    text = tmp_path / "text.txt"
    text.write_text("w3 w4 w5")
    recipes = {
        method: parse_recipe(RECIPE.replace("TEXT", str(text)).replace("METHOD", method)) for method in ("trsp", "sleb")
    }

    def compared(*ratios: float) -> Compared:
        home = tmp_path / "home"
        return compare(recipes, str(release), ratios, (), home, shown, "espalier compare …", on_cluster)

    return compared


@pytest.fixture
def sleb_fails(cluster: KubeflowServer, tmp_path: Path) -> None:
    """A cluster on which cells of trsp are measured, and those of sleb fail."""

    def on_run(sent: V2beta1Run) -> None:
        for cell in sent.runtime_config.parameters["cells"]:
            leave_stage(cell["run"], "learn_gates")
            fails = "sleb:" in cell["recipe"]
            if fails:
                leave_failure(cell["run"], "learn_gates", RuntimeError("out of memory"))
            else:
                leave_report(tmp_path / "stages", cell["run"])
            leave_end(cell["run"], succeeded=not fails)

    cluster.on_run = on_run
    cluster.looks = [("FAILED", {})]


@pytest.mark.usefixtures("sleb_fails")
class TestAComparison:
    def test_has_the_measured_cells_and_the_reasons_of_the_others(self, compared: Callable[..., Compared]) -> None:
        made = compared(0.25)
        cells = {cell.recipe: cell for cell in made.comparison.cells}
        assert cells["trsp"].models["candidate"].layers == 9
        assert cells["sleb"].reason.startswith("learn_gates: RuntimeError: out of memory (http://")
        (line,) = [
            line for line in csv.DictReader((made.folder / "comparison.csv").open()) if line["state"] == "failed"
        ]
        assert line["recipe"] == "sleb"
        assert "out of memory" in (made.folder / "comparison.html").read_text()
        stored = Store.from_environment().read_text(f"comparisons/{made.folder.name}/comparison.json")
        assert stored == made.comparison.to_json() == (made.folder / "comparison.json").read_text()

    def test_submits_what_is_not_measured_and_can_be_applied(
        self, compared: Callable[..., Compared], cluster: KubeflowServer, shown: Console
    ) -> None:
        compared(0.25)
        compared(0.25, 0.95)
        first, again = ([cell["recipe"] for cell in run.runtime_config.parameters["cells"]] for run in cluster.runs)
        assert [("sleb:" in recipe) for recipe in first] == [False, True]
        assert [("sleb:" in recipe) for recipe in again] == [True], "trsp is measured, and 0.95 leaves no layer"
        printed = shown.file.getvalue()  # type: ignore[attr-defined]
        assert "1 of 4 cells were measured before" in printed
        assert "trsp at 0.95 failed: methods.trsp.ratio 0.95 removes 4 of the model's 4 layers" in printed

    def test_shows_its_cells_as_they_end(self, compared: Callable[..., Compared], shown: Console) -> None:
        compared(0.25)
        printed = shown.file.getvalue()  # type: ignore[attr-defined]
        assert "trsp at 0.25: done (1 of 2 cells, about " in printed
        assert "sleb at 0.25: failed (2 of 2 cells, 1 failed)" in printed

    def test_needs_no_mlflow_here(
        self, compared: Callable[..., Compared], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert compared(0.25).folder.exists()
        address = environment["MLFLOW_TRACKING_URI"]
        assert MlflowClient(address, address).get_experiment_by_name(environment["MLFLOW_EXPERIMENT_NAME"]) is None


def test_a_server_that_does_not_answer_ends_the_command(
    compared: Callable[..., Compared], cluster: KubeflowServer
) -> None:
    cluster.fails_next = 10
    with pytest.raises(Unavailable, match="503"):
        compared(0.25)
