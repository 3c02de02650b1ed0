"""A run in processes of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from kfp import local
from rich.console import Console

from components.lib.errors import Refusal, StageFailed
from pipeline.runners.local import run_here
from tests.pipeline.toys import refusing, silent


def test_what_a_stage_said_counts_more_than_its_exit_code(tmp_path: Path, shown: Console) -> None:
    with pytest.raises(Refusal, match="the release is not to be had"):
        run_here(refusing, local.SubprocessRunner(use_venv=False), {}, tmp_path / "log.txt", shown)


def test_a_stage_that_is_killed_is_named_with_the_likely_cause(tmp_path: Path, shown: Console) -> None:
    with pytest.raises(
        StageFailed,
        match=r"the stage evaluate was ended from outside: .* more memory.*; for less memory lower evaluate.batch_size",
    ):
        run_here(silent, local.SubprocessRunner(use_venv=False), {}, tmp_path / "log.txt", shown)
