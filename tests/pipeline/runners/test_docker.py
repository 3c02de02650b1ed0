"""A run in containers of this machine: its end is the report in the store, not an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from kfp.local import docker_task_handler, status
from rich.console import Console

from components.lib.errors import Refusal, StageFailed
from components.lib.recipe.schema import Recipe
from pipeline.runners.docker import DockerRunner, container_environment
from pipeline.runners.run import run
from tests.pipeline.toys import last

RELEASE = "owner/model@main"


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
    monkeypatch.setattr(DockerRunner, "_engine", lambda self, console: {})


def test_a_lost_exit_code_makes_no_run_succeed(
    lost_exit_codes: None, environment: dict[str, str], recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    with pytest.raises(StageFailed):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=DockerRunner())


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
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=DockerRunner())


def test_no_engine_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch, shown: Console) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    with pytest.raises(Refusal, match=r"no Docker engine answers .* run with --on local"):
        DockerRunner()._engine(shown)
