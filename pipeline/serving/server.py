"""Serve a registered version on this machine, with a server that speaks OpenAI's protocol: vLLM, or `transformers serve`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.lib import vllm
from components.lib.errors import Refusal
from components.lib.store.store import Store
from components.lib.tracking.registry import Version


@dataclass(frozen=True)
class Server:
    """A server that is ready to be started."""

    name: str
    """`vllm` or `transformers`."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """The variables that it needs beside those of this process."""
    folder: Path
    """The folder that it runs in."""

    def replace_this_process(self) -> None:
        """Run the server in the place of this process, so that it gets the signals of whoever started this one."""
        os.chdir(self.folder)
        os.execve(self.command[0], list(self.command), {**os.environ, **self.environment})


def fetch(version: Version, home: Path) -> Path:
    """Return the folder of the version's checkpoint in the home, under the model's name; download it if it is not there.

    Raises:
        Refusal: a file is missing or differs from its digest, or the disk is too small.
    """
    folder = home.absolute() / "served" / version.reference.digest
    if not (folder / "model").is_dir():
        Store.from_environment().get(version.reference, folder, ["model"])
    named = folder / version.name
    if not named.exists():
        named.symlink_to("model")
    return named


def server(model: Path, port: int, python: str | None = None, options: Sequence[str] = ()) -> Server:
    """Return the server for a checkpoint: vLLM if it is installed, else `transformers serve`.

    Args:
        model: the folder of the checkpoint, whose name requests give in the field `model`.
        port: a port of the loopback address.
        python: the interpreter of the environment that vLLM is installed in; that of ESPALIER_VLLM_PYTHON, or this one, if it is absent.
        options: further options of the server.

    Raises:
        Refusal: the named interpreter is missing, or no server is installed.
    """
    found = vllm.interpreter(python)
    if found:
        command = vllm.server_command(found, model, model.name, port, options)
        return Server("vllm", command, vllm.ENVIRONMENT, model.parent)
    if not all(importlib.util.find_spec(package) for package in ("fastapi", "uvicorn", "openai")):
        raise Refusal(
            "no server is installed: install espalier[serve] for `transformers serve`, or name the interpreter of an "
            "environment with vLLM (--python)"
        )
    # It takes a folder as the name of the model, so it runs beside the folder.
    run = ("-c", "from transformers.cli.transformers import main; main()", "serve", model.name)
    place = ("--host", vllm.LOOPBACK, "--port", str(port))
    return Server("transformers", (sys.executable, *run, *place, *options), {"HF_HUB_OFFLINE": "1"}, model.parent)
