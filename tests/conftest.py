"""The servers the tests speak to: a real S3 (rclone) and a real MLflow, on loopback, for the whole session."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from components.lib.store.store import Store
from pipeline.services.embedded import BUCKET, services

# No example fails for taking long: a busy machine is no fault of the code.
settings.register_profile("espalier", deadline=None)
settings.load_profile("espalier")

NAMED_ELSEWHERE = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "ESPALIER_BUCKET",
    "ESPALIER_VLLM_PYTHON",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_URI",
)


@pytest.fixture(autouse=True, scope="session")
def _own_environment() -> Iterator[None]:
    """What this machine names is not the tests' to write to."""
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMED_ELSEWHERE:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def s3_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of `s3_server`; its buckets are the folders below `s3`."""
    return tmp_path_factory.mktemp("s3-home")


@pytest.fixture(scope="session")
def servers_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of `servers`."""
    return tmp_path_factory.mktemp("servers-home")


@pytest.fixture(scope="session")
def s3_server(s3_home: Path, _own_environment: None) -> Iterator[dict[str, str]]:
    """An S3 server's environment."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", "none, so that none is started")
            environment = stack.enter_context(services(s3_home))
        yield environment


@pytest.fixture(scope="session")
def servers(servers_home: Path, _own_environment: None) -> Iterator[dict[str, str]]:
    """The environment of an S3 server and of MLflow on it."""
    with services(servers_home) as environment:
        yield environment


@pytest.fixture
def s3_environment(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The S3 server, named in the environment, and a prefix of this test's own."""
    environment = s3_server | {"ESPALIER_BUCKET": f"{BUCKET}/{uuid.uuid4().hex}"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.fixture
def store(s3_environment: dict[str, str]) -> Store:
    """A store with nothing in it."""
    return Store.from_environment()


@pytest.fixture
def environment(servers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """S3 and MLflow, named in the environment; S3 with a prefix and MLflow with an experiment of this test's own."""
    own = uuid.uuid4().hex
    named = servers | {"ESPALIER_BUCKET": f"{BUCKET}/{own}", "MLFLOW_EXPERIMENT_NAME": own}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    return named


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two small files, one of them in a folder of its own."""
    made = tmp_path / "artifact"
    (made / "model").mkdir(parents=True)
    (made / "model" / "weights").write_bytes(bytes(range(256)) * 4)
    (made / "notes.json").write_text("{}")
    return made
