"""`espalier` in processes that are forked with the libraries loaded, runner and stages alike: they start in no time.

Each is a process of its own, with its own pid to kill; the pipeline, the runner and the components are the real ones. Only the
start of an interpreter, which imports torch for seconds, is left out.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# What the stages import; the fork server loads this module before it forks.
import mlflow  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
from kfp.dsl import executor_main
from kfp.local import subprocess_task_handler

import pipeline.recompress  # noqa: F401
from pipeline.cli import main as command_line

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


def start(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path, errors: Path | None = None
) -> ForkServerProcess:
    """Start `espalier` with these arguments and this environment beside the caller's.

    Args:
        arguments: of the command.
        environment: variables that are set or changed.
        log: the file of its output.
        errors: the file of its standard error; None is `log`.
    """
    variables = {**os.environ, **environment}
    process = _CONTEXT.Process(target=_espalier, args=(list(arguments), variables, str(log), str(errors or log)))
    process.start()
    return process


def call(
    work: Callable[..., None], arguments: Sequence[Any], environment: Mapping[str, str], log: Path
) -> ForkServerProcess:
    """Call a module's function in such a process, its output in `log`."""
    variables = {**os.environ, **environment}
    process = _CONTEXT.Process(target=_called, args=(work, tuple(arguments), variables, str(log)))
    process.start()
    return process


def _called(work: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    _begin(environment, log, log)
    work(*arguments)


def _espalier(arguments: list[str], environment: dict[str, str], log: str, errors: str) -> None:
    _begin(environment, log, errors)
    torch.set_num_threads(1)
    subprocess_task_handler.run_local_subprocess = _run_stage
    sys.argv = ["espalier", *arguments]
    command_line.main()


def _begin(environment: dict[str, str], log: str, errors: str) -> None:
    """Take the caller's environment, not that of the fork server's start, and write to the files."""
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((1, log), (2, errors)):
        _write_to(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


def _run_stage(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
    """Do what `kfp.local.subprocess_task_handler.run_local_subprocess` does, by a fork.

    The command is `sh -ec <script> <the component's code> <arguments of the executor>`.
    """
    code, arguments = full_command[3], full_command[4:]
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os._exit(_stage(code, arguments, env_vars or {}, writing))
    os.close(writing)
    with os.fdopen(reading, errors="replace") as printed:
        for line in printed:
            print(line, end="")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _stage(code: str, arguments: list[str], environment: dict[str, str], output: int) -> int:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _write_to(output, 1, 2)
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "ephemeral_component.py"
        module.write_text(code)
        sys.argv = ["executor", "--component_module_path", str(module), *arguments]
        try:
            executor_main.executor_main()
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
    return 0


def _write_to(output: int, *streams: int) -> None:
    """Send the streams, 1 and 2, to the open file `output`."""
    for stream in streams:
        os.dup2(output, stream)
    os.close(output)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
