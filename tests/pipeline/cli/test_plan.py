"""`espalier plan` shows every stage beside its device."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.cli.options import console
from tests.components.lib.transformer import zoo

RECIPE = """
methods: {shortgpt: {ratio: 0.25}}
calibration: {data: absent.txt, length: 128}
regularize: {transfer: none}
evaluate: {perplexity: {test: absent.txt}, speed: {enabled: false}, controls: []}
"""
PROFILE = """
environment: {ESPALIER_BUCKET: b}
stages:
  regularize: {gpu: {}, node_selector: {nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB}}
  evaluate: {memory: 1025Mi}
"""


def plan(folder: Path, *arguments: str) -> str:
    """Return the lines that the verb prints for a release of four layers."""
    zoo.release(zoo.SPECIMENS[0].model(layers=4), folder / "release")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "profile.yaml").write_text(PROFILE)
    given = ["plan", str(folder / "recipe.yaml"), "--model", str(folder / "release"), *arguments]
    console.width = 500  # the table is not folded, however wide the terminal is
    ended = CliRunner().invoke(app, given, catch_exceptions=False)
    assert ended.exit_code == 0
    return ended.output


def row(printed: str, stage: str) -> str:
    """Return the row of a stage."""
    return next(line for line in printed.splitlines() if line.startswith(f"{stage} "))


def test_each_stage_stands_beside_the_device_that_the_profile_gives_it(tmp_path: Path) -> None:
    printed = plan(tmp_path, "--profile", str(tmp_path / "profile.yaml"), "--set", "calibration.length=2048")
    stages = [line.split()[0] for line in printed.splitlines()[1:] if line[:1].islower()]
    assert stages == ["pin", "learn-gates", "regularize", "prune", "evaluate"]
    assert "84.8" in row(printed, "regularize")  # 79 GiB
    assert "logits" in row(printed, "regularize")
    assert row(printed, "evaluate").count("too small") == 1
    assert "too small" not in row(printed, "regularize")
