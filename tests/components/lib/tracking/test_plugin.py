"""The runs that the Kubeflow server's MLflow plugin makes are the ones that the stages write to."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components.lib.tracking import client, runs
from tests.components.lib.tracking.given import a_run

PARENT = "mlflow.parentRunId"


@pytest.fixture
def mlflow(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A mlflow, whose experiment is one that the plugin chose."""
    mlflow = MlflowClient()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mlflow.create_experiment(f"plugin {uuid.uuid4()}"))
    return mlflow


def task_run(mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch, parent: str) -> str:
    """What the plugin does before a task starts."""
    run = mlflow.create_run(client.experiment_id(), tags={PARENT: parent}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run)
    return run


def plugin_parent(mlflow: MlflowClient) -> str:
    return mlflow.create_run(client.experiment_id(), run_name="made by Kubeflow").info.run_id


def test_the_plugins_parent_run_becomes_the_recompressions(
    mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = plugin_parent(mlflow)
    task_run(mlflow, monkeypatch, parent)

    assert runs.open_parent("one", {"espalier.name": "tiny"}, {"method": "trsp"}) == parent
    found = runs.find_parent("one")
    assert found is not None
    assert found.info.run_id == parent
    assert found.data.params["method"] == "trsp"


def test_a_stage_writes_to_the_run_of_its_task_and_makes_none(
    mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parent = plugin_parent(mlflow)
    task_run(mlflow, monkeypatch, parent)
    runs.open_parent("one", {}, {})
    own = task_run(mlflow, monkeypatch, parent)
    before = len(mlflow.search_runs([client.experiment_id()]))

    with a_run("one", tmp_path) as journal:
        journal.metrics({"loss": 2.0}, step=1)
        journal.flush()

    assert len(mlflow.search_runs([client.experiment_id()])) == before
    run = mlflow.get_run(own)
    assert run.data.metrics["loss"] == 2.0
    assert run.data.tags["espalier.stage"] == "prune"
    assert run.info.status == "FINISHED"


def test_a_watchers_second_recompression_does_not_take_the_firsts_parent(
    mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = plugin_parent(mlflow)
    task_run(mlflow, monkeypatch, parent)
    assert runs.open_parent("one", {}, {}) == parent
    task_run(mlflow, monkeypatch, parent)

    second = runs.open_parent("two", {}, {})

    assert second != parent
    assert mlflow.get_run(parent).data.tags[runs.LABEL] == "one"


def test_closing_one_recompression_leaves_the_stages_of_another_running(
    mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parent = plugin_parent(mlflow)
    task_run(mlflow, monkeypatch, parent)
    runs.open_parent("one", {}, {})
    killed = task_run(mlflow, monkeypatch, parent)
    mlflow.set_tag(killed, runs.STAGE_OF, "one")
    others = task_run(mlflow, monkeypatch, parent)
    mlflow.set_tag(others, runs.STAGE_OF, "two")

    runs.close_parent("one", succeeded=True)

    assert mlflow.get_run(killed).info.status == "FAILED"
    assert mlflow.get_run(others).info.status == "RUNNING"
    assert mlflow.get_run(parent).info.status == "FINISHED"
