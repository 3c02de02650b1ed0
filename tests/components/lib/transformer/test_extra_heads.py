"""Heads for multi-token prediction, which transformers does not load, are dropped by name and never in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from components.lib.transformer.checkpoint import WEIGHTS, PrunableCheckpoint, load_model
from components.lib.transformer.export import save_model, verify_cut
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.family import HEADS, no_heads
from components.lib.transformer.surgery import cut_checkpoint
from tests.components.lib.transformer.zoo import HEADS_OF, release_with_head


@pytest.fixture(params=HEADS_OF)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return release_with_head(request.param, tmp_path / "source")


def test_a_cut_drops_them_and_names_them(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (head,) = PrunableCheckpoint.open(source).ignored
    assert head in HEADS_OF.values()
    cut_checkpoint(source, tmp_path / "cut", (0, 3))
    assert f"such as {head}, are dropped" in caplog.text
    assert head not in load_file(tmp_path / "cut" / WEIGHTS)
    assert not PrunableCheckpoint.open(tmp_path / "cut").config.get(HEADS)
    assert verify_cut(source, tmp_path / "cut", (0, 3)).dropped == (head,)


def test_an_export_without_a_cut_drops_them_too(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(load_model(source), source, tmp_path / "saved")
    assert "are dropped" in caplog.text
    assert PrunableCheckpoint.open(tmp_path / "saved").ignored == ()
    assert not PrunableCheckpoint.open(tmp_path / "saved").config.get(HEADS)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_that_transformers_ignores_is_known(model_type: str) -> None:
    """The rows name what the model classes ignore: blocks beyond the count, or names that begin with `mtp`."""
    ignored = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[model_type]]._keys_to_ignore_on_load_unexpected or []
    family = FAMILIES[model_type]
    if any("layers" in pattern for pattern in ignored):
        assert family.per_layer[HEADS] is no_heads
    if any("mtp" in pattern for pattern in ignored):
        assert any(prefix.startswith(("mtp", "model.mtp")) for prefix in family.ignored)
