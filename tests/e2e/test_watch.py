"""The watcher, as a person or a cluster starts it: two at once, a family nobody knows, and its pipeline with kfp itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import boto3
import pytest
from kfp import local
from mlflow import MlflowClient

from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.store.store import Store
from pipeline.runners.run import files_to_store
from pipeline.services.embedded import Services
from pipeline.watch import watch_pipeline
from tests.e2e.conftest import Bench, environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUICK = (
    "methods={shortgpt: {ratio: 0.25}}",
    "regularize.schedule=none",
    "evaluate.controls=[]",
    "evaluate.speed.enabled=false",
)


@pytest.fixture
def recipe(bench: Bench) -> Recipe:
    return parse_recipe(bench.recipe.read_text(), QUICK)


@pytest.fixture
def recipe_file(recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "quick.yaml"
    path.write_text(recipe.to_yaml())
    return path


@pytest.fixture
def store(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The bench's store; its services are named in this process's environment."""
    for name, value in Services(bench.home).up().items():
        monkeypatch.setenv(name, value)
    return Store.from_environment()


def versions(name: str) -> list[str]:
    return [str(one.version) for one in MlflowClient().search_model_versions(f"name = '{name}'")]


def put(folder: Path, store: Store, prefix: str) -> str:
    """Put a folder's files on S3 as somebody else would, and return the prefix."""
    for path in folder.iterdir():
        boto3.session.Session().client("s3").upload_file(
            str(path), store.bucket, f"{store.prefix}/{prefix}/{path.name}".lstrip("/")
        )
    return store.uri(prefix)


def test_two_watchers_at_once_make_one_version(bench: Bench, recipe_file: Path, store: Store) -> None:
    command = bench.command(
        "watch", "--once", "--source", str(bench.release), "--recipe", str(recipe_file), "--name", "two"
    )
    watchers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        for _ in range(2)
    ]
    told = [watcher.communicate() for watcher in watchers]
    assert [watcher.returncode for watcher in watchers] == [0, 0], told
    assert sum("pass" in printed for printed, _ in told) == 1, told
    assert sum("another watcher" in printed or "claimed" in printed for printed, _ in told) == 1, told
    assert versions("two") == ["1"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert again.returncode == 0
    assert "registered" in again.stdout
    assert versions("two") == ["1"]


def test_a_family_that_is_not_known_is_refused_once_and_remembered(
    bench: Bench, recipe_file: Path, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "strange"
    folder.mkdir()
    for path in bench.release.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "perceiver"}))
    source = put(folder, store, "strange")
    arguments = ("watch", "--once", "--source", source, "--recipe", str(recipe_file), "--name", "strange")
    first, again = bench.espalier(*arguments), bench.espalier(*arguments)
    assert (first.status, again.status) == (1, 0), first.told + again.told
    for outcome in (first, again):
        assert "failed" in outcome.printed
        assert "perceiver" in outcome.printed
    assert len(list((bench.home / "runs").glob("strange-*"))) == 1


def test_the_pipeline_itself_finds_recompresses_and_finds_nothing_more(
    bench: Bench, recipe: Recipe, store: Store, tmp_path: Path
) -> None:
    """The stages' outputs are there from the first test, so that this is about the second pipeline."""
    source = {
        "release": put(bench.release, store, "releases/new"),
        "name": "scheduled",
        "recipe": files_to_store(recipe, store).to_yaml(),
    }
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"))
    watch = watch_pipeline(at_most=2)
    watch(sources=[source])
    (tagged,) = MlflowClient().search_model_versions("name = 'scheduled'")
    assert any(tag.startswith("sha256.item.") for tag in tagged.tags)
    watch(sources=[source])
    assert versions("scheduled") == ["1"]
    assert store.folders("claims/scheduled") == [], "a registered item is no longer claimed"
