"""The throughput of a step: every matrix product is counted, and held against the machine's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.training import Throughput, main, measure, peak
from components.lib.recipe.training import Objective, Regularize
from tests.components.lib.training.tiny import llama
from tests.components.lib.transformer import zoo

LENGTH, BATCH = 16, 4


def settings(**fields: object) -> Regularize:
    given = {"steps": 2, "batch_size": BATCH, "learning_rate": 1e-3, "precision": "fp32"}
    return Regularize.model_validate(given | fields)


def test_the_operations_are_those_of_the_products() -> None:
    model = llama()
    alone = settings(objective=Objective(lm=1, kl=0, state=0))
    found = measure(model, None, LENGTH, alone)
    matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)  # the tied head counts once
    # Forward, and two products as large in the backward pass; attention has two of length x length, then five.
    products = 6 * matrices * BATCH * LENGTH
    attention = 4 * 7 * 2 * BATCH * LENGTH * LENGTH * 32
    assert found.operations == products + attention
    assert found.tokens == pytest.approx(BATCH * LENGTH / found.seconds)


def test_the_teacher_s_forward_pass_counts() -> None:
    alone = measure(llama(), None, LENGTH, settings(objective=Objective(lm=1, kl=0, state=0)))
    taught = measure(llama(), llama(), LENGTH, settings())
    assert taught.operations > 1.25 * alone.operations


def test_the_part_is_of_the_peak() -> None:
    assert Throughput(tokens=1, operations=3e12, seconds=2).part_of(3e12) == 0.5
    assert peak(torch.float32, side=64, seconds=0.05) > 0


def test_a_folder_s_figures_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.release(zoo.Specimen("llama", "llama").model(layers=2), tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--length", "16", "--steps", "1", "--side", "64"]
    monkeypatch.setattr(sys, "argv", ["training", *given, "--set", "regularize.precision=fp32"])
    main()
    told = capsys.readouterr().out
    assert "the step computes in fp32" in told
    assert told.splitlines()[-1].count("TFLOP/s") == 2
