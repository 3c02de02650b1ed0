"""A server of a checkpoint as a process that answers, a chat request to it, and the version that a manifest deploys."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

VLLM = os.environ.get("ESPALIER_TEST_VLLM")
"""The interpreter of an environment that has vLLM."""
START_SECONDS = 480.0

PYTHONS = pytest.mark.parametrize(
    "python",
    [
        None,
        pytest.param(
            VLLM,
            marks=pytest.mark.skipif(VLLM is None, reason="set ESPALIER_TEST_VLLM to an interpreter that has vLLM"),
        ),
    ],
    ids=["transformers", "vllm"],
)
"""The interpreters that a test serves with: none for `transformers serve`, and that of vLLM."""

SMALL = ("--max-model-len", "64", "--enforce-eager")
"""vLLM's options for a tiny model."""


def need_server(python: str | None) -> None:
    """Skip the test if neither server is installed."""
    if python is None:
        pytest.importorskip("openai", reason="transformers serve needs espalier[serve]")


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def answering(
    command: Sequence[str], port: int, log: Path, folder: Path | None = None, **environment: str
) -> Iterator[str]:
    """Run a server in a folder until the block ends; yield its address as soon as it answers."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **environment}
    with log.open("w") as said:
        process = subprocess.Popen(list(command), env=given, cwd=folder, stdout=said, stderr=said)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{address}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.terminate()
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def chat(address: str, model: str, text: str) -> dict[str, Any]:
    """Ask for four tokens at most."""
    asked = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return dict(json.load(answer))


def deployed(file: Path) -> str:
    """Return the version in the manifest; empty if there is none yet."""
    return str(yaml.safe_load(file.read_text())["metadata"]["annotations"]["espalier.version"]) if file.exists() else ""


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until it holds; fail if the process ends before, or after a minute."""
    deadline = time.monotonic() + 60
    while not holds():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
