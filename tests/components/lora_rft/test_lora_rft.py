"""LoRA-RFT leaves the pruned model with its adapters merged in, verified like every export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from components.lib.recipe.training import Recover
from components.lib.transformer.checkpoint import Checkpoint, load_model
from components.lib.transformer.export import VerificationError
from components.lib.transformer.text import load_windows
from components.lora_rft import lora_rft as stage
from components.lora_rft.lora_rft import lora_rft
from tests.components.given import TRAINING, Given, weights
from tests.components.lib.training.tiny import Kept, Written

SETTINGS = Recover.model_validate(TRAINING | {"enabled": True, "validation": 0.25, "evaluate_every": 2})
KEPT = SETTINGS.model_copy(update={"keep_adapter": True})
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far logits may differ, relative to the largest: merged weights are rounded to their type, adapters beside them are not."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """The release stands for the pruned model: any checkpoint will do."""
    return Given.lay(tmp_path_factory.mktemp("run"))


def without_card(given: Given, folder: Path) -> Path:
    shutil.copytree(given.folder, folder, ignore=shutil.ignore_patterns("README.md"))
    return folder


def work(given: Given, out: Path, recover: Recover = SETTINGS) -> Written:
    out.mkdir()
    journal = Written()
    lora_rft(
        given.release, given.windows, recover=recover, out=out, journal=journal, checkpoints=Kept(out.parent / "kept")
    )
    return journal


def test_the_model_is_a_plain_checkpoint_that_learnt(given: Given, tmp_path: Path) -> None:
    work(given, tmp_path / "out")
    made, pruned = Checkpoint.open(tmp_path / "out/model"), Checkpoint.open(given.release / "model")
    assert (made.layers, made.parameters, made.dtype) == (4, pruned.parameters, pruned.dtype)
    assert weights(tmp_path / "out").keys() == weights(given.release).keys()
    assert given.perplexity(tmp_path / "out") < given.perplexity(given.release)


def test_the_held_out_perplexity_is_journalled_from_before_the_first_step(given: Given, tmp_path: Path) -> None:
    journal = work(given, tmp_path / "out")
    assert [step for step, values in journal.lines if "validation" in values] == [0, 2, 4, 6]


def test_the_pruned_model_with_the_adapters_that_are_kept_computes_what_the_merged_one_does(
    given: Given, tmp_path: Path
) -> None:
    work(given, tmp_path / "out", KEPT)
    pruned, merged = load_model(given.release / "model"), load_model(tmp_path / "out/model")
    ids = load_windows(given.windows)[:2].long()
    with torch.no_grad():
        before, expected = pruned(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(pruned, tmp_path / "out/adapter").eval()(ids).logits
    assert (before - expected).abs().max() > 0.1 * expected.abs().max()
    assert (adapted - expected).abs().max() < ROUNDING[merged.dtype] * expected.abs().max()


def test_adapters_are_kept_if_the_recipe_says_so_and_are_the_same_bytes_every_time(
    given: Given, tmp_path: Path
) -> None:
    work(given, tmp_path / "without")
    assert not (tmp_path / "without/adapter").exists()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        work(given, tmp_path / name / "out", KEPT)
    kept = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "out/adapter").iterdir()}
        for name in ("one", "two")
    ]
    assert kept[0] == kept[1]
    assert kept[0].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(kept[0]["adapter_config.json"])
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"] == sorted(config["target_modules"])


def test_what_was_proved_is_told(given: Given, tmp_path: Path) -> None:
    work(given, tmp_path / "out")
    told = json.loads((tmp_path / "out/verification.json").read_text())
    assert (told["removed"], told["layers"], told["max_difference"]) == ([], 4, 0.0)


def test_the_pruned_model_s_card_is_carried_and_tells_of_the_training(given: Given, tmp_path: Path) -> None:
    """Its head too, with the licence."""
    card = "---\nlicense: mit\n---\n\n# A pruned model\n"
    pruned = Given(tmp_path / "with-card")
    shutil.copytree(given.folder, pruned.folder)
    (pruned.release / "model/README.md").write_text(card)
    work(pruned, tmp_path / "out")
    made = (tmp_path / "out/model/README.md").read_text()
    assert made.startswith(card)
    assert "fine-tuned with LoRA adapters of rank 16 for at most 6 steps" in made
    assert "merged into the weights" in made


def test_a_model_without_a_card_gets_none(given: Given, tmp_path: Path) -> None:
    work(Given(without_card(given, tmp_path / "bare")), tmp_path / "out")
    assert not (tmp_path / "out/model/README.md").exists()


def test_an_export_that_is_not_what_was_trained_is_not_published(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saves_the_old_one(model: PreTrainedModel, source: Path, out: Path) -> None:
        shutil.copytree(source, out)

    monkeypatch.setattr(stage, "save_model", saves_the_old_one)
    with pytest.raises(VerificationError, match="does not compute what it was exported from"):
        work(given, tmp_path / "out")
    assert not (tmp_path / "out/verification.json").exists()
