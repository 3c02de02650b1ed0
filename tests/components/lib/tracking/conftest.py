"""MLflow for the tests of this folder, and a server that is away."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from mlflow import MlflowClient


@pytest.fixture
def mlflow(environment: dict[str, str]) -> MlflowClient:
    """MLflow, with an experiment of this test's own."""
    return MlflowClient()


@pytest.fixture
def name() -> str:
    """A registered model's name that no other test uses: the registry is shared."""
    return f"model-{uuid.uuid4().hex}"


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Make MLflow unreachable by `away.setenv(*AWAY)`, and reachable again by `away.undo()`; requests are not retried."""
    with pytest.MonkeyPatch.context() as patch:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield patch
