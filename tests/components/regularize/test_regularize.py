"""Regularize leaves the release, all its layers there, trained so that the chosen ones can go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.lib.recipe.training import Regularize
from components.lib.transformer.checkpoint import Checkpoint
from components.lib.transformer.surgery import cut_checkpoint
from components.regularize.regularize import regularize
from tests.components.given import ADAPTERS, CHANNELS, TRAINING, Given, digest, weights
from tests.components.lib.training.tiny import Kept, Written, same


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given.lay(tmp_path_factory.mktemp("run"))


def work(given: Given, out: Path, journal: Written | None = None, **settings: Any) -> Path:
    out.mkdir(parents=True)
    regularize(
        given.release,
        given.windows,
        given.selection,
        regularize=Regularize.model_validate(TRAINING | settings),
        out=out,
        journal=journal or Written(),
        checkpoints=Kept(out.parent / "kept"),
    )
    return out


@pytest.mark.parametrize(
    "settings", [{}, {"schedule": "penalty"}, {"trainable": "lora"}, {"teacher_top": 8, "transfer": "ridge"}]
)
def test_the_model_is_a_plain_checkpoint_that_does_better_without_the_chosen_layer(
    settings: dict[str, Any], given: Given, tmp_path: Path
) -> None:
    before = digest(given.release)
    out = work(given, tmp_path / "out", **settings)
    made, dense = Checkpoint.open(out / "model"), Checkpoint.open(given.release / "model")
    assert (made.layers, made.parameters, made.dtype) == (4, dense.parameters, dense.dtype)
    assert given.perplexity(out, without=(1,)) < given.perplexity(given.release, without=(1,))
    for file in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (out / "model" / file).read_bytes() == (given.release / "model" / file).read_bytes()
    assert digest(given.release) == before


def test_every_step_is_journalled(given: Given, tmp_path: Path) -> None:
    journal = Written()
    work(given, tmp_path / "out", journal)
    assert [step for step, values in journal.lines if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert journal.done[-1] == (6, 6)


def test_the_annealed_layer_can_be_cut_without_a_change(given: Given, tmp_path: Path) -> None:
    out = work(given, tmp_path / "out")
    cut_checkpoint(out / "model", tmp_path / "cut/model", (1,))
    assert given.perplexity(tmp_path / "cut") == pytest.approx(given.perplexity(out, without=(1,)))


@pytest.mark.parametrize("settings", [{}, {"schedule": "penalty"}, ADAPTERS])
def test_the_model_does_better_without_the_chosen_channels_and_has_them_still(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    given, journal = Given.lay(tmp_path / "run", CHANNELS), Written()
    out = work(given, tmp_path / "out", journal, **settings)
    made, dense = Checkpoint.open(out / "model"), Checkpoint.open(given.release / "model")
    assert (made.config, made.parameters) == (dense.config, dense.parameters)
    assert given.perplexity(out, (1,), CHANNELS) < given.perplexity(given.release, (1,), CHANNELS)
    assert {"slices_attention", "slices_ffn", "slices_rest"} <= set(journal.lines[0][1])


def test_the_annealed_channels_can_be_cut_without_a_change(tmp_path: Path) -> None:
    given = Given.lay(tmp_path / "run", CHANNELS)
    out = work(given, tmp_path / "out")
    cut_checkpoint(out / "model", tmp_path / "cut/model", (1,), CHANNELS)
    assert given.perplexity(tmp_path / "cut") == pytest.approx(given.perplexity(out, (1,), CHANNELS), rel=1e-4)


def test_the_same_inputs_give_the_same_weights(given: Given, tmp_path: Path) -> None:
    first, second = (work(given, tmp_path / name / "out") for name in "ab")
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(given.release))
