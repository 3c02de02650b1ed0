"""Calibrate leaves windows of the text, and tells what they were drawn from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.calibrate.windows import calibrate
from components.lib.errors import Refusal
from components.lib.recipe.schema import Calibration
from components.lib.training.journal import Silent
from components.lib.transformer.text import token_stream
from tests.components.lib.transformer import zoo

ROWS = [" ".join(f"w{3 + (row * word) % 90}" for word in range(1, 101)) for row in range(1, 11)]
"""Ten documents of 100 tokens."""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    zoo.release(zoo.SPECIMENS[0].model(layers=2), folder / "model")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"body": row}) for row in ROWS))
    return folder


def settings(**fields: object) -> Calibration:
    data = {"path": "rows.jsonl", "field": "body"}
    return Calibration.model_validate({"data": data, "samples": 5, "length": 16, "seed": 3} | fields)


def draw(release: Path, text: Path, out: Path, **fields: object) -> torch.Tensor:
    out.mkdir()
    calibrate(release, text, calibration=settings(**fields), out=out, journal=Silent())
    return load_file(out / "windows.safetensors")["windows"]


def test_windows_are_stretches_of_the_text_in_the_models_tokens(release: Path, text: Path, tmp_path: Path) -> None:
    windows = draw(release, text, tmp_path / "out")
    assert windows.dtype == torch.int32
    assert windows.shape == (5, 16)
    stretches = token_stream(ROWS, zoo.tokenizer()).unfold(0, 16, 1)  # every stretch of 16 tokens
    for window in windows:
        assert (stretches == window).all(dim=1).any()


def test_what_they_were_drawn_from_is_told(release: Path, text: Path, tmp_path: Path) -> None:
    draw(release, text, tmp_path / "out")
    assert json.loads((tmp_path / "out/calibration.json").read_text()) == {
        "documents": 10,
        "tokens": 1000,
        "windows_possible": 62,
        "samples": 5,
        "length": 16,
        "seed": 3,
    }


def test_the_seed_decides(release: Path, text: Path, tmp_path: Path) -> None:
    first = draw(release, text, tmp_path / "first")
    assert torch.equal(first, draw(release, text, tmp_path / "again"))
    assert not torch.equal(first, draw(release, text, tmp_path / "other", seed=4))


def test_text_too_short_is_refused_with_the_windows_it_gives(release: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="asks for 63 windows of 16 tokens and the text's 1000 tokens give 62"):
        draw(release, text, tmp_path / "out", samples=63)
    assert not any((tmp_path / "out").iterdir())
