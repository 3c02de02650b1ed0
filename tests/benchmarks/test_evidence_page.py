"""docs/evidence.md says what the figures say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence_page


def of(perplexity: float, **more: Any) -> dict[str, Any]:
    return {"text": perplexity} | more


FIGURES = {
    "dense": of(10.0, tasks={"piqa": {"acc": 0.6, "acc_norm": 0.8, "acc_norm_stderr": 0.02}}),
    "choice/seam/0.2/0": {"removed": [4, 3]},
    "transfer/seam/0.2/0": of(14.0),
    "transfer/last/0.2/0": of(28.0),
    "candidate/seam/0.2/0": of(12.0, tasks={"piqa": {"acc_norm": 0.7, "acc_norm_stderr": 0.02}}),
    "candidate/seam/0.2/1": of(13.0),
    "candidate/seam/0.2/2": of(18.0),
    "control/seam/0.2/0": of(16.0),
    "control/seam/0.2/1": of(26.0),
}
CONDITIONS = {
    "title": "Layers",
    "calibration": "web.txt",
    "steps": "40 steps",
    "command": "python -m benchmarks.evidence --model smol",
    "arguments": {"samples": "320", "length": "256"},
    "tokens": {"text": 100},
    "versions": {"torch": "2"},
}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "evidence-layers.json").write_text(json.dumps({"conditions": CONDITIONS, "figures": FIGURES}))
    monkeypatch.setattr(evidence_page, "FIGURES", tmp_path)
    return evidence_page.page().splitlines()


def test_the_page_in_the_repository_is_up_to_date() -> None:
    assert evidence_page.PAGE.read_text() == evidence_page.page(), "run: python -m benchmarks.evidence_page"


def test_a_row_is_the_median_of_the_seeds_with_the_least_and_the_greatest(page: list[str]) -> None:
    assert "| `seam`, trained | 13.0 (12.0 to 18.0) | 70.0 | 3 |" in page
    assert "| `last`, no training | 28.0 |  | 1 |" in page


def test_a_ratio_is_taken_on_the_seeds_that_both_have(page: list[str]) -> None:
    assert "| `seam`, trained / its control | 0.625 (0.500 to 0.750) | 2 |" in page
    assert "| `seam` / `last`, no training | 0.500 | 1 |" in page


def test_a_task_counts_by_its_normalised_accuracy(page: list[str]) -> None:
    assert "| dense | 80.0 ± 2.0 | 80.0 ± 2.0 |" in page


def test_a_section_names_its_command_and_the_layers(page: list[str]) -> None:
    assert "    python -m benchmarks.evidence --model smol" in page
    assert "Layers removed on the first seed: `seam` 3, 4." in page
