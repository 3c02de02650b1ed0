"""A run on a cluster: its end is the report in the store, whatever the server says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.lib.errors import Refusal, StageFailed
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.store.runs import leave_failure
from components.lib.store.store import Store
from pipeline.kubeflow.profile import Profile
from pipeline.runners.docker import DockerRunner
from pipeline.runners.kubeflow import KubeflowRunner
from pipeline.runners.local import LocalRunner
from pipeline.runners.run import run
from tests.components.register.conftest import build_report, write_run
from tests.pipeline.kubeflow.server import KubeflowServer

IMAGE = "registry.example.org/espalier@sha256:" + "a" * 64
RELEASE = "owner/model@main"


@pytest.fixture
def cluster() -> Iterator[KubeflowServer]:
    made = KubeflowServer()
    yield made
    made.close()


@pytest.fixture
def on_cluster(cluster: KubeflowServer, environment: dict[str, str]) -> KubeflowRunner:
    settings: dict[str, Any] = {
        "image": IMAGE,
        "kubeflow": {"host": cluster.address},
        "environment": {"ESPALIER_BUCKET": environment["ESPALIER_BUCKET"]},
    }
    return KubeflowRunner(Profile.model_validate(settings), pause=0)


def leave_report(folder: Path, label: str) -> None:
    """What the last stage does on the cluster."""
    report = build_report(write_run(folder))
    Store.from_environment().write_text(f"runs/{label}/report.json", report.to_json())
    Store.from_environment().write_text(f"runs/{label}/report.html", "<html></html>")


def test_a_run_on_a_cluster_ends_with_the_report_of_the_store(
    on_cluster: KubeflowRunner, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.on_run = lambda sent: leave_report(tmp_path / "stages", sent.display_name)
    cluster.looks = [("RUNNING", {"root": "RUNNING", "pin-driver": "SUCCEEDED"}), ("SUCCEEDED", {"pin": "SUCCEEDED"})]

    result = run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)

    (sent,) = cluster.runs
    assert result.report.candidate.layers == 9
    assert (result.folder / "report.html").exists()
    printed = shown.file.getvalue()  # type: ignore[attr-defined]
    assert f"/#/runs/details/{sent.run_id}" in printed
    assert "[ 1/12] pin: done in 7.0 s" in printed
    assert "driver" not in printed


def test_a_clusters_run_sees_references_alone(
    on_cluster: KubeflowRunner, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.on_run = lambda sent: leave_report(tmp_path / "stages", sent.display_name)
    run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)

    sent = cluster.runs[0].runtime_config.parameters
    assert set(sent) == {"release", "recipe", "name", "run"}
    assert str(tmp_path) not in json.dumps(sent)
    for _, text in parse_recipe(sent["recipe"]).texts():
        assert (text.path or "").startswith("s3://")


def test_a_stages_refusal_on_a_cluster_reaches_the_person(
    on_cluster: KubeflowRunner, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.on_run = lambda sent: leave_failure(sent.display_name, "pin", Refusal("no such model: name another"))
    cluster.looks = [("FAILED", {"pin": "FAILED"})]
    with pytest.raises(Refusal, match=r"^no such model: name another$"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)


def test_a_stage_that_was_killed_is_told_with_the_runs_address(
    on_cluster: KubeflowRunner, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.looks = [("FAILED", {"pin": "SUCCEEDED", "regularize": "FAILED"})]
    with pytest.raises(StageFailed, match=r"^regularize failed \(http://.*/#/runs/details/run-1\)$"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)


def test_a_run_that_succeeded_and_left_no_report_is_an_error(
    on_cluster: KubeflowRunner, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    with pytest.raises(StageFailed, match=r"left no report\.json"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)


def test_an_image_without_a_digest_is_refused_before_anything_is_stored(
    environment: dict[str, str], recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    profile = Profile.load("plain", "espalier:cpu")
    with pytest.raises(Refusal, match="has no digest"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=KubeflowRunner(profile))
    assert Store.from_environment().folders("texts") == []


def test_runners_say_whether_the_services_may_be_embedded(on_cluster: KubeflowRunner) -> None:
    assert [place.embeds for place in (LocalRunner(), DockerRunner(), on_cluster)] == [True, True, False]
