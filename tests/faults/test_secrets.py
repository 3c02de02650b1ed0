"""Secrets of the environment stay out of the pipeline that is compiled, and of refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from components.lib.errors import Refusal
from components.lib.store.store import Store

CANARY = "canary5f2c9e71d0b84a36"
NAMES = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "KF_PIPELINES_TOKEN")


def test_the_compiled_pipeline_holds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, CANARY)
    out = tmp_path / "pipeline.yaml"
    image = f"registry.example/espalier@sha256:{'a' * 64}"
    arguments = ["compile", "--profile", "plain", "--image", image, "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "pipeline.cli.main", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pipelineInfo" in out.read_text()
    assert CANARY not in out.read_text() + done.stdout + done.stderr


def test_an_s3_that_refuses_the_key_is_named_without_the_key(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    with pytest.raises(Refusal) as raised:
        Store.from_environment().check()
    assert CANARY not in str(raised.value)
