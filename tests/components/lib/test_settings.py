"""The environment variables that name the services."""

from __future__ import annotations

import pytest

from components.lib.settings import KubeflowSettings, MlflowSettings, StoreSettings


def test_variables_are_read_by_their_prefix_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_BUCKET", "s3://bucket/prefix")
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://ui")
    monkeypatch.setenv("MLFLOW_RUN_ID", "one")
    assert StoreSettings().bucket == "s3://bucket/prefix"
    assert KubeflowSettings().ui_endpoint == "https://ui"
    assert MlflowSettings().run_id == "one"
    monkeypatch.setenv("MLFLOW_RUN_ID", "two")
    assert MlflowSettings().run_id == "two"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_BUCKET", "")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")
    assert StoreSettings().bucket is None
    assert MlflowSettings().experiment_name == "espalier"
