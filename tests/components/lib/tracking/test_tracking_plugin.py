"""The runs that the Kubeflow server's MLflow plugin makes are the ones that the stages write to."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from components.lib.tracking import tracking

PARENT = "mlflow.parentRunId"


@pytest.fixture
def client(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A client, whose experiment is one that the plugin chose."""
    client = MlflowClient()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment(f"plugin {uuid.uuid4()}"))
    return client


def task_run(client: MlflowClient, monkeypatch: pytest.MonkeyPatch, parent: str) -> str:
    """What the plugin does before a task starts."""
    run = client.create_run(tracking.experiment_id(), tags={PARENT: parent}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run)
    return run


def plugin_parent(client: MlflowClient) -> str:
    return client.create_run(tracking.experiment_id(), run_name="made by Kubeflow").info.run_id


def a_stage(run: str, key: str = "a" * 64) -> Any:
    return SimpleNamespace(
        name="prune", variant="", run=run, key=key, code="c", inputs={}, settings={}, tell=lambda *_, **__: None
    )


def test_the_plugins_parent_run_becomes_the_recompressions(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = plugin_parent(client)
    task_run(client, monkeypatch, parent)

    assert tracking.open_parent("one", {"espalier.name": "tiny"}, {"method": "trsp"}) == parent
    found = tracking.find_parent("one")
    assert found is not None
    assert found.info.run_id == parent
    assert found.data.params["method"] == "trsp"


def test_a_stage_writes_to_the_run_of_its_task_and_makes_none(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    parent = plugin_parent(client)
    task_run(client, monkeypatch, parent)
    tracking.open_parent("one", {}, {})
    own = task_run(client, monkeypatch, parent)
    before = len(client.search_runs([tracking.experiment_id()]))

    with tracking.stage_run(a_stage("one"), tmp_path) as journal:
        journal.metrics({"loss": 2.0}, step=1)
        journal.flush()

    assert len(client.search_runs([tracking.experiment_id()])) == before
    run = client.get_run(own)
    assert run.data.metrics["loss"] == 2.0
    assert run.data.tags["espalier.stage"] == "prune"
    assert run.info.status == "FINISHED"


def test_a_watchers_second_recompression_does_not_take_the_firsts_parent(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = plugin_parent(client)
    task_run(client, monkeypatch, parent)
    assert tracking.open_parent("one", {}, {}) == parent
    task_run(client, monkeypatch, parent)

    second = tracking.open_parent("two", {}, {})

    assert second != parent
    assert client.get_run(parent).data.tags[tracking.LABEL] == "one"


def test_closing_one_recompression_leaves_the_stages_of_another_running(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    parent = plugin_parent(client)
    task_run(client, monkeypatch, parent)
    tracking.open_parent("one", {}, {})
    killed = task_run(client, monkeypatch, parent)
    client.set_tag(killed, tracking.STAGE_OF, "one")
    others = task_run(client, monkeypatch, parent)
    client.set_tag(others, tracking.STAGE_OF, "two")

    tracking.close_parent("one", succeeded=True)

    assert client.get_run(killed).info.status == "FAILED"
    assert client.get_run(others).info.status == "RUNNING"
    assert client.get_run(parent).info.status == "FINISHED"
