"""A registered version is fetched, compared with its digests, and answers chat requests by OpenAI's protocol on loopback."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest
import torch

from components.lib.errors import Refusal
from components.lib.store.store import Store
from components.lib.tracking import registry, runs
from components.lib.tracking.registry import Version
from pipeline.serving.server import fetch, server
from tests.components.lib.transformer import zoo
from tests.pipeline.serving.given import PYTHONS, SMALL, answering, chat, free_port, need_server

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture
def version(environment: dict[str, str], tmp_path: Path) -> Version:
    """A tiny model with a chat template, registered as champion under a name of its own."""
    model = zoo.release(
        zoo.SPECIMENS[0].model(layers=2, heads=1, key_value_heads=1, dtype=torch.bfloat16), tmp_path / "put" / "model"
    )
    (model / "chat_template.jinja").write_text(TEMPLATE)
    reference = Store.from_environment().put_content(tmp_path / "put", "stages/prune")
    name = f"model-{uuid.uuid4().hex[:8]}"
    made = registry.register_version(name, reference, runs.open_parent("one", {}, {}), {"espalier.verdict": "pass"})
    registry.set_alias(name, "champion", made.version)
    return registry.find_version(f"{name}@champion")


def test_the_checkpoint_is_fetched_once_and_compared_with_its_digests(version: Version, tmp_path: Path) -> None:
    folder = fetch(version, tmp_path / "home")
    assert folder.name == version.name
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert fetch(version, tmp_path / "home") == folder
    assert weights.stat().st_mtime_ns == before


def test_a_named_interpreter_serves_with_vllm_on_loopback(tmp_path: Path) -> None:
    found = server(tmp_path / "small", 8123, sys.executable, ["--max-model-len", "64"])
    assert found.name == "vllm"
    assert found.command[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    assert found.command[-6:] == ("--host", "127.0.0.1", "--port", "8123", "--max-model-len", "64")
    assert found.command[found.command.index("--served-model-name") + 1] == "small"


def test_an_interpreter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="which is no program"):
        server(tmp_path, 8123, "/no/python")


def test_without_a_server_the_refusal_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"install espalier\[serve\]"):
        server(tmp_path, 8123)


@PYTHONS
def test_the_champion_answers_a_chat_request(python: str | None, version: Version, tmp_path: Path) -> None:
    need_server(python)
    port = free_port()
    command = [sys.executable, "-m", "pipeline.cli.main", "serve", f"{version.name}@champion", "--port", str(port)]
    named = ["--python", python] if python else []
    options = SMALL if python else []
    with answering(
        [*command, *named, "--home", str(tmp_path / "home"), "--", *options], port, tmp_path / "log"
    ) as address:
        answer = chat(address, version.name, "w5 w6 w7")
    assert answer["model"].startswith(version.name)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert 1 <= answer["usage"]["completion_tokens"] <= 4
