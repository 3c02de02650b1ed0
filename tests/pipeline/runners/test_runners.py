"""A run is what it is wherever it runs: done when its report is in the store, whatever a runner says of exit codes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp import local
from kfp.local import docker_task_handler, status
from rich.console import Console

from components.lib.errors import Refusal, StageFailed
from components.lib.recipe.schema import Recipe
from components.lib.store.runs import leave_failure
from components.lib.store.store import Store
from pipeline.kubeflow.profile import Profile
from pipeline.runners import runners
from pipeline.runners.run import run
from pipeline.runners.runners import Docker, Kubeflow, Local, container_environment
from tests.components.register.conftest import build_report, write_run
from tests.pipeline.kubeflow.server import KubeflowServer
from tests.pipeline.toys import last, refusing

IMAGE = "registry.example.org/espalier@sha256:" + "a" * 64
RECIPE = """
method: trsp
target: {ratio: 0.25}
calibration: {data: TEXT, samples: 2, length: 8}
evaluate: {perplexity: {one: TEXT}}
"""
RELEASE = "owner/model@main"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 50)
    return Recipe.from_yaml(RECIPE.replace("TEXT", str(text)))


@pytest.fixture
def shown() -> Console:
    return Console(file=io.StringIO(), width=300)


# Containers


def test_a_container_is_told_of_the_services_and_of_no_path() -> None:
    given = {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000",
        "AWS_SECRET_ACCESS_KEY": "x",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "ESPALIER_BUCKET": "espalier",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "AWS_CA_BUNDLE": "/etc/ca.crt",
        "AWS_SHARED_CREDENTIALS_FILE": "/home/me/.aws/credentials",
        "ESPALIER_HOME": "/home/me/.espalier",
        "HF_HOME": "/home/me/.cache",
        "PATH": "/usr/bin",
        "HOME": "/home/me",
    }
    told = container_environment(given)
    assert {name for name in given if name in told} == {
        "AWS_ENDPOINT_URL_S3",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_URI",
        "ESPALIER_BUCKET",
        "NO_PROXY",
        "OMP_NUM_THREADS",
    }


def test_what_a_container_prints_can_be_cut_anywhere() -> None:
    codec, errors = container_environment({})["PYTHONIOENCODING"].split(":")
    printed = "perplexité 59,4 ▕█▏".encode(codec, errors)
    assert all(printed[:end].decode() for end in range(1, len(printed)))


@pytest.fixture
def lost_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every container ends before its work, and Docker has lost the exit code by the time that kfp asks."""
    monkeypatch.setattr(docker_task_handler.DockerTaskHandler, "run", lambda self: status.Status.SUCCESS)
    monkeypatch.setattr(Docker, "_engine", lambda self, console: {})


def test_a_lost_exit_code_makes_no_run_succeed(
    lost_exit_codes: None, environment: dict[str, str], recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    with pytest.raises(StageFailed):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=Docker())


def test_a_lost_exit_code_of_the_last_stage_is_found_by_the_missing_report(
    lost_exit_codes: None,
    environment: dict[str, str],
    recipe: Recipe,
    tmp_path: Path,
    shown: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.recompress.recompress", last)
    with pytest.raises(StageFailed, match=r"left no report\.json in the store"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=Docker())


def test_what_a_stage_said_counts_more_than_its_exit_code(tmp_path: Path, shown: Console) -> None:
    with pytest.raises(Refusal, match="the release is not to be had"):
        runners._run_here(refusing, local.SubprocessRunner(use_venv=False), {}, tmp_path / "log.txt", shown)


def test_no_engine_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch, shown: Console) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    with pytest.raises(Refusal, match=r"no Docker engine answers .* run with --on local"):
        Docker()._engine(shown)


# Kubeflow


@pytest.fixture
def cluster() -> Iterator[KubeflowServer]:
    made = KubeflowServer()
    yield made
    made.close()


@pytest.fixture
def on_cluster(cluster: KubeflowServer, environment: dict[str, str]) -> Kubeflow:
    settings: dict[str, Any] = {
        "image": IMAGE,
        "kubeflow": {"host": cluster.address},
        "environment": {"ESPALIER_BUCKET": environment["ESPALIER_BUCKET"]},
    }
    return Kubeflow(Profile.model_validate(settings), pause=0)


def leave_report(folder: Path, label: str) -> None:
    """What the last stage does on the cluster."""
    report = build_report(write_run(folder))
    Store.from_environment().write_text(f"runs/{label}/report.json", report.to_json())
    Store.from_environment().write_text(f"runs/{label}/report.html", "<html></html>")


def test_a_run_on_a_cluster_ends_with_the_report_of_the_store(
    on_cluster: Kubeflow, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.on_run = lambda sent: leave_report(tmp_path / "stages", sent.display_name)
    cluster.looks = [("RUNNING", {"root": "RUNNING", "pin-driver": "SUCCEEDED"}), ("SUCCEEDED", {"pin": "SUCCEEDED"})]

    result = run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)

    (sent,) = cluster.runs
    assert result.report.candidate.layers == 9
    assert (result.folder / "report.html").exists()
    printed = shown.file.getvalue()  # type: ignore[attr-defined]
    assert f"/#/runs/details/{sent.run_id}" in printed
    assert "[ 1/11] pin: done in 7.0 s" in printed
    assert "driver" not in printed


def test_a_clusters_run_sees_references_alone(
    on_cluster: Kubeflow, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.on_run = lambda sent: leave_report(tmp_path / "stages", sent.display_name)
    run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)

    sent = cluster.runs[0].runtime_config.parameters
    assert set(sent) == {"release", "recipe", "name", "run"}
    assert str(tmp_path) not in json.dumps(sent)
    for _, text in Recipe.from_yaml(sent["recipe"]).texts():
        assert (text.path or "").startswith("s3://")


def test_a_stages_refusal_on_a_cluster_reaches_the_person(
    on_cluster: Kubeflow, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.on_run = lambda sent: leave_failure(sent.display_name, "pin", Refusal("no such model: name another"))
    cluster.looks = [("FAILED", {"pin": "FAILED"})]
    with pytest.raises(Refusal, match=r"^no such model: name another$"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)


def test_a_stage_that_was_killed_is_told_with_the_runs_address(
    on_cluster: Kubeflow, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.looks = [("FAILED", {"pin": "SUCCEEDED", "regularize": "FAILED"})]
    with pytest.raises(StageFailed, match=r"^regularize failed \(http://.*/#/runs/details/run-1\)$"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)


def test_a_run_that_succeeded_and_left_no_report_is_an_error(
    on_cluster: Kubeflow, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    with pytest.raises(StageFailed, match=r"left no report\.json"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)


def test_an_image_without_a_digest_is_refused_before_anything_is_stored(
    environment: dict[str, str], recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    profile = Profile.load("plain", "espalier:cpu")
    with pytest.raises(Refusal, match="has no digest"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=Kubeflow(profile))
    assert Store.from_environment().folders("texts") == []


def test_runners_say_whether_the_services_may_be_embedded(on_cluster: Kubeflow) -> None:
    assert [place.embeds for place in (Local(), Docker(), on_cluster)] == [True, True, False]
