"""What the runners' tests start from."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.store.store import Store
from pipeline.kubeflow.profile import Profile
from pipeline.runners.kubeflow import KubeflowRunner
from tests.components.register.conftest import build_report, write_run
from tests.pipeline.kubeflow.server import KubeflowServer

IMAGE = "registry.example.org/espalier@sha256:" + "a" * 64

RECIPE = """
methods: {trsp: {ratio: 0.25}}
calibration: {data: TEXT, samples: 2, length: 8}
evaluate: {perplexity: {one: TEXT}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 50)
    return parse_recipe(RECIPE.replace("TEXT", str(text)))


@pytest.fixture
def shown() -> Console:
    return Console(file=io.StringIO(), width=300)


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
