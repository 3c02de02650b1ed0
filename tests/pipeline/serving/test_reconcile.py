"""What is deployed is what the alias names, once it is verified; nothing else changes it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.lib.errors import Refusal, Unavailable
from components.lib.provenance.signature import SIGNATURE
from components.lib.store import s3
from components.lib.store.store import Store
from components.lib.tracking import registry
from pipeline.kubeflow.profile import Profile
from pipeline.serving import reconcile
from pipeline.serving.manifest import manifest
from pipeline.serving.reconcile import Reconciler, Target
from tests.pipeline.serving.conftest import Register
from tests.pipeline.serving.given import deployed, wait_until

PROFILE = Profile(environment={"ESPALIER_BUCKET": "espalier"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "champion.yaml"


@pytest.fixture
def reconciler(name: str, file: Path) -> Reconciler:
    return Reconciler(f"{name}@champion", PROFILE, "InferenceService", Target(file, apply=False))


def overwrite(uri: str, text: str) -> None:
    bucket, key = s3.split(uri)
    s3.client(s3.PATIENT).put_object(Bucket=bucket, Key=key, Body=text.encode())


def test_the_champion_is_deployed_and_a_second_look_changes_nothing(
    reconciler: Reconciler, register: Register, file: Path
) -> None:
    version = register("first", "champion")
    found = reconciler.look()
    assert (found.status, found.reason, found.version) == ("True", "Deployed", "1")
    assert found.message == "version 1 is deployed: verdict pass, unsigned"
    assert file.read_text() == manifest(version, PROFILE)
    before = file.stat().st_mtime_ns
    assert reconciler.look().reason == "UpToDate"
    assert file.stat().st_mtime_ns == before


def test_an_alias_that_moves_is_followed_there_and_back(
    reconciler: Reconciler, register: Register, name: str, file: Path
) -> None:
    register("first", "champion")
    register("second")
    for version in ("1", "2", "1"):
        registry.set_alias(name, "champion", version)
        assert reconciler.look().reason == "Deployed"
        assert deployed(file) == version


def test_a_restart_deploys_nothing_again(reconciler: Reconciler, register: Register, name: str, file: Path) -> None:
    register("first", "champion")
    reconciler.look()
    again = Reconciler(f"{name}@champion", PROFILE, "InferenceService", Target(file, apply=False))
    assert again.look().reason == "UpToDate"


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ("model/model.safetensors", "model/model.safetensors has the sha256"),
        ("model/chat_template.jinja", "model/chat_template.jinja has the sha256"),
        ("model/added.jinja", "holds model/added.jinja, which was added after the evaluation"),
    ],
)
def test_a_version_whose_files_do_not_hold_is_not_deployed_although_a_person_set_the_alias(
    damaged: str, said: str, reconciler: Reconciler, register: Register, name: str, file: Path
) -> None:
    register("first", "champion")
    reconciler.look()
    second = register("second", "champion")
    overwrite(f"{second.reference.uri}/{damaged}", "SECOND")
    found = reconciler.look()
    assert (found.status, found.reason, found.version) == ("False", "Refused", "2")
    assert said in found.message
    assert deployed(file) == "1"


def test_a_repaired_version_is_deployed_when_its_refusal_is_old(
    reconciler: Reconciler, register: Register, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = f"{register('first', 'champion').reference.uri}/model/model.safetensors"
    overwrite(weights, "FIRST")
    assert reconciler.look().reason == "Refused"
    overwrite(weights, "first")
    assert reconciler.look().reason == "Refused"
    monkeypatch.setattr(reconcile, "RETRY", 0.0)
    assert reconciler.look().reason == "Deployed"


def test_a_signature_that_is_required_must_be_there(name: str, register: Register, file: Path) -> None:
    register("first", "champion")
    target = Target(file, apply=False)
    found = Reconciler(f"{name}@champion", PROFILE, "InferenceService", target, require_signature=True).look()
    assert found.reason == "Refused"
    assert f"has no signature ({SIGNATURE})" in found.message
    assert not file.exists()


def test_without_the_alias_what_is_deployed_stays(
    reconciler: Reconciler, register: Register, name: str, file: Path
) -> None:
    register("first", "champion")
    reconciler.look()
    registry.drop_alias(name, "champion", "1")
    assert reconciler.look().reason == "NoVersion"
    assert deployed(file) == "1"


def test_an_alias_that_moves_while_its_files_are_read_is_looked_at_again(
    reconciler: Reconciler, register: Register, name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("first", "champion")
    register("second")
    verify = reconcile.verify_files

    def verify_slowly(*arguments: object) -> str:
        registry.set_alias(name, "champion", "2")
        return verify(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reconcile, "verify_files", verify_slowly)
    assert reconciler.look().version == "2"
    assert deployed(file) == "2"


def test_a_service_that_is_away_changes_nothing(
    reconciler: Reconciler, register: Register, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register("first", "champion")
    reconciler.look()
    register("second", "champion")

    def away(*_: object) -> str:
        raise Unavailable("S3 is away")

    monkeypatch.setattr(reconcile, "verify_files", away)
    monkeypatch.setattr(Store, "check", away)
    found = reconciler.look()
    assert (found.status, found.reason) == ("Unknown", "Unavailable")


def test_an_address_without_an_alias_is_refused() -> None:
    for address in ("model", "model@3"):
        with pytest.raises(Refusal, match="names no alias"):
            Reconciler(address, PROFILE, "InferenceService", Target(None, apply=True))


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name that keeps what it is given, and fails if a file says so. Returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(
        f'#!/bin/sh\n[ -f {folder}/broken ] && echo "no such kind" >&2 && exit 1\necho "$@" >> {folder}/said\ncat >> {folder}/given\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_kubectl_applies_the_manifest_once(kubectl: Path, name: str, register: Register) -> None:
    version = register("first", "champion")
    reconciler = Reconciler(f"{name}@champion", PROFILE, "InferenceService", Target(None, apply=True))
    assert [reconciler.look().reason for _ in range(3)] == ["Deployed", "UpToDate", "UpToDate"]
    assert (kubectl / "said").read_text() == "apply --server-side --field-manager=espalier -f -\n"
    assert (kubectl / "given").read_text() == manifest(version, PROFILE)


def test_a_manifest_that_was_not_applied_is_not_written_and_is_applied_later(
    kubectl: Path, name: str, register: Register, file: Path
) -> None:
    register("first", "champion")
    (kubectl / "broken").touch()
    reconciler = Reconciler(f"{name}@champion", PROFILE, "InferenceService", Target(file, apply=True))
    found = reconciler.look()
    assert (found.status, found.reason) == ("Unknown", "Unavailable")
    assert "no such kind" in found.message
    assert not file.exists()
    (kubectl / "broken").unlink()
    assert reconciler.look().reason == "Deployed"


def test_the_verb_follows_the_alias_and_says_each_change_once(
    name: str, register: Register, file: Path, tmp_path: Path
) -> None:
    register("first", "champion")
    register("second")
    command = [sys.executable, "-m", "pipeline.cli.main", "deploy", f"{name}@champion", "--out", str(file)]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*command, "--watch", "--every", "0.1"], stdout=said, env=os.environ)
    try:
        wait_until(lambda: deployed(file) == "1", process)
        registry.set_alias(name, "champion", "2")
        wait_until(lambda: deployed(file) == "2", process)
        time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(30)
    conditions = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert [(one["reason"], one["version"]) for one in conditions] == [("Deployed", "1"), ("Deployed", "2")]
