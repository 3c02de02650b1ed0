"""vLLM is found in this environment, or in the one that is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from components.lib import vllm
from components.lib.errors import Refusal


def test_the_named_interpreter_comes_before_that_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm.interpreter() is None
    monkeypatch.setenv("ESPALIER_VLLM_PYTHON", sys.executable)
    assert vllm.interpreter() == sys.executable
    assert vllm.interpreter("sh") != sys.executable


@pytest.mark.parametrize(("named", "field"), [("/no/python", "--python"), (None, "ESPALIER_VLLM_PYTHON")])
def test_an_interpreter_that_is_not_there_is_refused(
    named: str | None, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_VLLM_PYTHON", "/no/python")
    with pytest.raises(Refusal, match=f"^{field} is '/no/python', which is no program"):
        vllm.interpreter(named)


def test_version_and_interpreter_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 1.2.3\n")
    program.chmod(0o755)
    monkeypatch.setenv("ESPALIER_VLLM_PYTHON", str(program))
    assert vllm.installed() == (str(program), "1.2.3")


def test_the_server_listens_on_loopback(tmp_path: Path) -> None:
    command = vllm.server_command("python", tmp_path, "small", 8123, ["--dtype=bfloat16"])
    assert command[:3] == ("python", "-m", "vllm.entrypoints.openai.api_server")
    assert command[-5:] == ("--host", "127.0.0.1", "--port", "8123", "--dtype=bfloat16")
