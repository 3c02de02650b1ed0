"""`espalier gc`, against a real S3 server and MLflow."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components.lib.errors import Refusal
from components.lib.store.store import Reference, Store
from components.lib.tracking import registry, runs
from components.register.run import ADAPTER_BASE, EVALUATION
from pipeline.cli import gc as verb

DAYS = 86400


@pytest.fixture
def name() -> str:
    return f"model-{uuid.uuid4().hex}"


@pytest.fixture
def versioned(environment: dict[str, str], name: str, folder: Path, servers_home: Path) -> Store:
    """A store with a version's artifacts and a dead run's, forty days old, and the version in MLflow."""
    store = Store.from_environment()

    def made(prefix: str, **inputs: Reference) -> Reference:
        return store.put(folder, prefix, {"inputs": {one: str(reference) for one, reference in inputs.items()}})

    trained = made("stages/regularize/t", release=made("releases/r"))
    candidate = made("stages/prune/c", regularized=trained)
    evaluation = made("stages/evaluate/e", candidate=candidate, control=made("stages/control/k"))
    made("stages/regularize/dead")
    made("checkpoints/dead/step-000002")
    run = runs.open_parent("one", {}, {})
    registry.register_version(name, candidate, run, {EVALUATION: str(evaluation)})
    store.write_text("runs/one/report.json", json.dumps({"registered": {"name": name, "version": "1"}}))
    for path in (servers_home / "s3" / store.bucket / store.prefix).rglob("*"):
        os.utime(path, (time.time() - 40 * DAYS,) * 2)
    time.sleep(1.2)  # the server remembers a folder for a second
    return store


def left(store: Store) -> set[str]:
    """The artifacts and reports that are left."""
    return {name.rpartition("/")[0].removesuffix("/model") for place in ("releases", "stages", "checkpoints", "runs")
            for name, *_ in store.objects(place)}  # fmt: skip


LINEAGE = {"releases/r", "stages/regularize/t", "stages/prune/c", "stages/evaluate/e", "stages/control/k", "runs/one"}
DEAD = {"stages/regularize/dead", "checkpoints/dead/step-000002"}


def test_lists_and_then_deletes_what_no_version_needs(
    versioned: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.gc(home=tmp_path)
    listed = capsys.readouterr().out
    assert "stages/regularize/dead" in listed
    assert "stages/prune/c" not in listed
    assert "pass --yes" in listed
    assert left(versioned) == LINEAGE | DEAD
    verb.gc(older_than="50d", yes=True, home=tmp_path)
    assert left(versioned) == LINEAGE | DEAD
    capsys.readouterr()
    verb.gc(yes=True, home=tmp_path)
    assert left(versioned) == LINEAGE
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in told if line[:2] in (["regularize", "1"], ["checkpoints", "1"])] == ["kB", "kB"]
    assert told[-1][:3] == ["in", "sum", "2"]


def test_deletes_models_that_versions_do_not_need_if_it_is_asked_for(versioned: Store, tmp_path: Path) -> None:
    verb.gc(yes=True, lineage=True, home=tmp_path)
    assert left(versioned) == LINEAGE - {"stages/regularize/t", "stages/control/k"}


def test_keeps_the_model_that_the_adapters_of_a_version_belong_to(versioned: Store, name: str, tmp_path: Path) -> None:
    base = {ADAPTER_BASE: f"{versioned.uri('stages/regularize/t')}@sha256:{'0' * 64}"}
    registry.tag_version(registry.version_of(name, "1"), base)
    verb.gc(yes=True, lineage=True, home=tmp_path)
    assert left(versioned) == LINEAGE - {"stages/control/k"}


def test_keeps_nothing_for_a_version_that_was_deleted(versioned: Store, name: str, tmp_path: Path) -> None:
    MlflowClient().delete_model_version(name, "1")
    verb.gc(yes=True, home=tmp_path)
    assert left(versioned) == {"runs/one"}


def test_refuses_an_mlflow_that_does_not_know_the_models_of_the_store(
    versioned: Store, name: str, tmp_path: Path
) -> None:
    MlflowClient().delete_registered_model(name)
    with pytest.raises(Refusal, match=f"the run one registered a version of {name}"):
        verb.gc(yes=True, home=tmp_path)
    assert left(versioned) == LINEAGE | DEAD
    verb.gc(yes=True, forget=[name], home=tmp_path)
    assert left(versioned) == {"runs/one"}


@pytest.mark.parametrize("age", ["0d", "12h", "30", "-1d", "1e3d"])
def test_refuses_an_age_of_less_than_a_day(age: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="--older-than is"):
        verb.gc(older_than=age, home=tmp_path)


def test_bytes_are_said_in_a_unit_of_three_digits() -> None:
    assert [verb._bytes(size) for size in (0, 999, 1500, 2 * 10**9, 3 * 10**12)] == ["0 B", "999 B", "1.5 kB", "2 GB", "3 TB"]  # fmt: skip
