"""Run the pipeline in processes of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console

from components.lib.errors import Refusal, StageFailed
from components.lib.stage.declaration import declared_stages
from pipeline.runners.progress import ProgressDisplay, displayed
from pipeline.runners.runner import task_names

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent


@dataclass(frozen=True)
class LocalRunner:
    """Processes of this machine."""

    embeds: ClassVar[bool] = True

    def services(self, home: Path) -> AbstractContextManager[Mapping[str, str]]:
        """Start the embedded services unless the environment names others."""
        from pipeline.services.embedded import services

        return services(home)

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        """Run each stage in a process of its own."""
        from kfp import local

        from pipeline.recompress import recompress

        run_here(recompress, local.SubprocessRunner(use_venv=False), arguments, log, console)


def run_here(pipeline: GraphComponent, runner: Any, arguments: Mapping[str, str], log: Path, console: Console) -> None:
    """Run the pipeline through kfp.local, with its progress on the console and everything that it prints in `log`.

    Raises:
        Refusal: a stage found something that the user can correct.
        StageFailed: a stage broke.
    """
    from kfp import local

    for name, value in arguments.items():
        # kfp.local replaces this word, anywhere in an argument, by the path of the interpreter.
        if "python3" in value:
            raise Refusal(f"the run's {name} contains the word 'python3', which kfp.local rewrites: use another name")
    # A temporary folder for each run: its path contains no word that kfp.local rewrites.
    with (
        tempfile.TemporaryDirectory(prefix="espalier-kfp-") as root,
        displayed(log, len(task_names(pipeline)), console) as display,
    ):
        local.init(runner=runner, pipeline_root=root)
        try:
            pipeline(**arguments)
        except Exception as error:
            # kfp raises a RuntimeError for a failed task, and many other types if an earlier task left no output.
            raise _ended(display, error, log) from error
    if display.refused or display.failed:
        raise _ended(display, None, log)


def _ended(display: ProgressDisplay, error: Exception | None, log: Path) -> Refusal | StageFailed:
    if display.refused:
        return Refusal(display.refused)
    if display.failed is None and display.silent:
        reason = (
            f"the stage {display.silent} was ended from outside: it was killed, or took more memory than it was given; "
            f"for less memory {_less_memory(display.silent)} (espalier plan says what each stage needs)"
        )
        return StageFailed(f"{reason} (the whole log: {log})")
    return StageFailed(f"{display.failed or error} (the whole log: {log})")


def _less_memory(label: str) -> str:
    """Return what lets a stage take less memory, in words."""
    stage = declared_stages().get(label.partition(" ")[0])
    section = stage.sections[0] if stage and stage.sections else ""
    if stage and stage.resumes:
        return f"set {section}.micro_batch_size to auto or {section}.gradient_checkpointing to true, or lower calibration.length"
    if section == "evaluate":
        return "lower evaluate.batch_size or evaluate.length"
    if stage and section == "methods" and not stage.leaves_checkpoint:
        return "lower the batch_size of the method"
    return "there is no setting, since it holds whole models: give it more"
