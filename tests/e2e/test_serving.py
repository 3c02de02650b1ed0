"""From a release to an answer: what passed is promoted, and a server answers with the files that the manifest names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.lib.store.artifacts import describe
from components.lib.store.store import Store
from components.lib.tracking import registry
from pipeline.services.embedded import Services
from pipeline.serving.server import server
from tests.components.lib.transformer.zoo import Specimen, release
from tests.e2e.conftest import Bench
from tests.pipeline.serving.given import PYTHONS, SMALL, answering, chat, free_port, need_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

NAME = "served"
QUICK = ("evaluate.controls=[]", "evaluate.speed.enabled=false")


@pytest.fixture(scope="module")
def served(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bench with a release that vLLM has kernels for: its smallest width of a head is 32."""
    model = Specimen("llama", "llama").model(layers=8, heads=1, key_value_heads=1, dtype=torch.bfloat16)
    return replace(bench, release=release(model, tmp_path_factory.mktemp("served") / "release"))


@pytest.fixture(scope="module")
def manifest(served: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recompress, promote, and write the champion's manifest."""
    passed = served.run(NAME, *QUICK)
    assert passed.status == 0, passed.told
    assert passed.report["registered"]["aliases"] == ["challenger"]
    promoted = served.espalier("promote", NAME, "--yes")
    assert promoted.status == 0, promoted.told
    return write(served, tmp_path_factory.mktemp("manifest") / "champion.yaml")


def write(bench: Bench, file: Path) -> Path:
    """Write the champion's manifest."""
    written = bench.espalier("manifest", f"{NAME}@champion", "--out", str(file))
    assert written.status == 0, written.told
    return file


@pytest.fixture
def checkpoint(served: Bench, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint, fetched from S3 by the manifest's URI alone, as KServe does."""
    for name, value in Services(served.home).up().items():
        monkeypatch.setenv(name, value)
    uri = yaml.safe_load(manifest.read_text())["spec"]["predictor"]["model"]["storageUri"]
    return Store.from_environment().fetch(uri, tmp_path / NAME)


def test_the_uri_of_the_manifest_names_the_files_that_were_measured(manifest: Path, checkpoint: Path) -> None:
    champion = registry.find_version(f"{NAME}@champion").reference
    annotations = yaml.safe_load(manifest.read_text())["metadata"]["annotations"]
    assert annotations["espalier.digest"] == f"sha256:{champion.digest}"
    measured = Store.from_environment().manifest(champion).only(["model"]).files
    assert {describe(path, f"model/{path.relative_to(checkpoint)}") for path in checkpoint.rglob("*")} == set(measured)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = AutoTokenizer.from_pretrained(checkpoint)("w5 w6 w7", return_tensors="pt").input_ids
    assert model.config.num_hidden_layers == 6
    assert torch.isfinite(model(ids).logits).all()


@PYTHONS
def test_a_server_answers_a_chat_request_with_them(python: str | None, checkpoint: Path, tmp_path: Path) -> None:
    need_server(python)
    port = free_port()
    made = server(checkpoint, port, python, SMALL if python else ())
    with answering(made.command, port, tmp_path / "log", made.folder, **made.environment) as address:
        answer = chat(address, NAME, "w5 w6 w7")
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert 1 <= answer["usage"]["completion_tokens"] <= 4
