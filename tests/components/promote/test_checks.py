"""A checkpoint that does not answer with finite numbers is not promoted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.lib.errors import Refusal
from components.promote.checks import generate
from tests.components.lib.transformer.zoo import Specimen, release


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return release(Specimen("llama", "llama").model(layers=2), tmp_path / "model")


def test_a_checkpoint_generates_the_same_text_every_time(folder: Path) -> None:
    assert generate(folder, "it") == generate(folder, "it")


def test_a_checkpoint_that_computes_no_finite_number_is_refused(tmp_path: Path) -> None:
    model = Specimen("llama", "llama").model(layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(Refusal, match="version 2 of m generates from logits that are not finite"):
        generate(release(model, tmp_path / "broken"), "version 2 of m")


def test_a_chat_template_that_does_not_render_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no greeting') }}")
    with pytest.raises(Refusal, match=r"version 2 of m cannot generate: the chat template .*no greeting"):
        generate(folder, "version 2 of m")


def test_a_tensor_that_is_missing_is_refused(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(Refusal):
        generate(folder, "version 2 of m")
