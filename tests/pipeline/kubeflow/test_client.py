"""A pipeline is uploaded once, a run of it started and followed to its end, and what goes wrong is told in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from components.lib.errors import Unavailable
from pipeline.kubeflow import client as kubeflow
from pipeline.kubeflow.client import KubeflowClient
from pipeline.kubeflow.compile import compile_pipeline, digest
from pipeline.kubeflow.profile import Profile, Server
from pipeline.recompress import recompress
from tests.pipeline.kubeflow.server import KubeflowServer

IMAGE = "registry.example.org/espalier@sha256:" + "a" * 64
ARGUMENTS = {"release": "s3://b/r@sha256:" + "0" * 64, "recipe": "method: trsp", "name": "tiny", "run": "tiny-1"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeflowServer]:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT", "KF_PIPELINES_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    made = KubeflowServer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def profile() -> Profile:
    return Profile.load("aws-irsa", IMAGE)


@pytest.fixture(scope="module")
def package(profile: Profile) -> str:
    return compile_pipeline(recompress, profile)


def connect(server: KubeflowServer, **more: str) -> KubeflowClient:
    return KubeflowClient(Server(host=server.address, **more))


def test_a_version_is_uploaded_once_and_named_by_its_digest(server: KubeflowServer, package: str) -> None:
    first = connect(server).upload("recompress", package)
    again = connect(server).upload("recompress", package)

    assert first == again
    assert first.name == digest(package)[:16]
    assert [one.display_name for one in server.versions] == ["recompress", first.name]
    assert set(server.uploads) == {package}


def test_another_digest_is_another_version_of_the_same_pipeline(server: KubeflowServer, package: str) -> None:
    first = connect(server).upload("recompress", package)
    other = connect(server).upload("recompress", package.replace("a" * 64, "b" * 64))

    assert other.pipeline_id == first.pipeline_id
    assert other.version_id != first.version_id
    assert len(server.pipelines) == 1


def test_a_run_takes_its_arguments_its_account_and_its_root(
    server: KubeflowServer, profile: Profile, package: str
) -> None:
    client = connect(server, ui="https://kubeflow.example.org/pipeline/")
    version = client.upload("recompress", package)

    run = client.start(version, "tiny-1", ARGUMENTS, profile)

    (sent,) = server.runs
    assert sent.display_name == "tiny-1"
    assert sent.runtime_config.parameters == ARGUMENTS
    assert sent.runtime_config.pipeline_root == profile.pipeline_root
    assert sent.service_account == "espalier"
    assert sent.pipeline_version_reference.pipeline_version_id == version.version_id
    assert run.address == f"https://kubeflow.example.org/pipeline/#/runs/details/{sent.run_id}"


def test_each_thing_that_a_task_comes_to_is_told_once(server: KubeflowServer, profile: Profile, package: str) -> None:
    server.looks = [
        ("RUNNING", {"pin": "RUNNING"}),
        ("RUNNING", {"pin": "RUNNING"}),
        ("RUNNING", {"pin": "SUCCEEDED", "calibrate": "RUNNING"}),
        ("SUCCEEDED", {"pin": "SUCCEEDED", "calibrate": "SUCCEEDED"}),
    ]
    client = connect(server)
    run = client.start(client.upload("recompress", package), "tiny-1", ARGUMENTS, profile)
    told: list[tuple[str, str, float | None]] = []

    ended = client.follow(run, lambda *event: told.append(event), pause=0)

    assert kubeflow.succeeded(ended)
    assert told == [
        ("pin", "opened", None),
        ("pin", "done", 7.0),
        ("calibrate", "opened", None),
        ("calibrate", "done", 7.0),
    ]


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_a_run_that_ends_badly_ends_the_following(
    server: KubeflowServer, profile: Profile, package: str, state: str
) -> None:
    server.looks = [(state, {"pin": "SUCCEEDED", "prune": "FAILED"})]
    client = connect(server)
    run = client.start(client.upload("recompress", package), "tiny-1", ARGUMENTS, profile)

    ended = client.follow(run, lambda *_: None, pause=0)

    assert not kubeflow.succeeded(ended)
    assert kubeflow.failed_task(ended) == "prune"


def test_a_server_that_is_away_for_a_moment_is_asked_again(
    server: KubeflowServer, profile: Profile, package: str
) -> None:
    client = connect(server)
    run = client.start(client.upload("recompress", package), "tiny-1", ARGUMENTS, profile)
    server.fails_next = 2

    assert kubeflow.succeeded(client.follow(run, lambda *_: None, pause=0))


def test_a_server_that_stays_away_is_given_up_with_the_runs_address(
    server: KubeflowServer, profile: Profile, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(server)
    run = client.start(client.upload("recompress", package), "tiny-1", ARGUMENTS, profile)
    monkeypatch.setattr(kubeflow, "PATIENCE", 0.0)
    server.fails_next = 1000

    with pytest.raises(Unavailable, match=rf"503 \(away for a moment\).*the run goes on: {run.address}"):
        client.follow(run, lambda *_: None, pause=0)


def test_no_server_is_told_with_its_address_and_the_cure() -> None:
    with pytest.raises(Unavailable, match=r"at http://127\.0\.0\.1:9 does not answer .*KF_PIPELINES_ENDPOINT"):
        KubeflowClient(Server(host="http://127.0.0.1:9"))


def test_the_token_goes_along_and_a_wrong_one_is_told(server: KubeflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.tokens = {"right"}
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "right")
    connect(server)

    monkeypatch.setenv("KF_PIPELINES_TOKEN", "wrong")
    with pytest.raises(Unavailable, match=r"401 \(the token is not known\): set KF_PIPELINES_TOKEN"):
        connect(server)
