"""vLLM, which usually lies in an environment of its own, because it pins other versions of the libraries.

The variable ESPALIER_VLLM_PYTHON names the interpreter of that environment. Without it, vLLM is looked for in this one.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.lib.errors import Refusal
from components.lib.settings import VllmSettings

LOOPBACK = "127.0.0.1"
ENVIRONMENT: Mapping[str, str] = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""The variables that vLLM needs beside those of this process, so that it asks no other machine."""

_VERSION = "from importlib.metadata import packages_distributions as of, version; print(version(of()['vllm'][0]))"


def interpreter(named: str | None = None) -> str | None:
    """Return the interpreter that is to have vLLM; None if none is named and vLLM is not installed here.

    Args:
        named: a path or a command, as `--python` gives it; that of ESPALIER_VLLM_PYTHON if it is absent.

    Raises:
        Refusal: the named one is no program.
    """
    python = named or VllmSettings().python
    if python is None:
        return sys.executable if importlib.util.find_spec("vllm") else None
    found = shutil.which(python)
    if found is None:
        field = "--python" if named else "ESPALIER_VLLM_PYTHON"
        raise Refusal(f"{field} is {python!r}, which is no program: name the interpreter of vLLM's environment")
    return found


def installed() -> tuple[str, str]:
    """Return the interpreter that has vLLM, and vLLM's version.

    Raises:
        Refusal: vLLM is not installed.
    """
    python = interpreter()
    told = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True) if python else None
    if python is None or told is None or told.returncode:
        where = f" in the environment of {python}" if python else ""
        raise Refusal(
            f"evaluate.speed.backend is vllm, which is not installed{where}: name the interpreter of an environment that has "
            "it in ESPALIER_VLLM_PYTHON, or set evaluate.speed.backend to transformers"
        )
    return python, told.stdout.strip()


def server_command(python: str, model: Path, name: str, port: int, options: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the command of vLLM's server on the loopback address.

    Args:
        python: the interpreter of its environment.
        model: the folder of a checkpoint.
        name: the model's name in requests.
        port: a port of the loopback address.
        options: further options of the server.
    """
    # The command `vllm` asks for a distribution of that name, which builds for CPUs do not have.
    entry = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name)
    return (*entry, "--host", LOOPBACK, "--port", str(port), *options)
