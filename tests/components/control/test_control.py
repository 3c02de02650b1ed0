"""The controls get the candidate's training and nothing else: one without what was chosen from the start, one with all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.control.control import control
from components.lib.recipe.training import Recover, Regularize
from components.lib.transformer.checkpoint import Checkpoint
from tests.components.given import ADAPTERS, CHANNELS, TRAINING, Given, SeveralKept
from tests.components.lib.training.tiny import Killed, Written


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given.lay(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def narrowing(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A run whose selection has channels too."""
    return Given.lay(tmp_path_factory.mktemp("run"), CHANNELS)


def work(
    given: Given,
    out: Path,
    kind: str,
    journal: Written | None = None,
    checkpoints: SeveralKept | None = None,
    recover: dict[str, Any] | None = None,
    **settings: Any,
) -> Written:
    out.mkdir(exist_ok=True)
    journal = journal or Written()
    control(
        given.release,
        given.windows,
        given.selection,
        kind=kind,
        regularize=Regularize.model_validate(TRAINING | settings),
        recover=Recover.model_validate(TRAINING | {"validation": 0.25, "evaluate_every": 2} | (recover or {})),
        out=out,
        journal=journal,
        checkpoints=checkpoints or SeveralKept(out.parent / "kept"),
    )
    return journal


def test_pruned_first_has_the_candidates_layers_and_its_training(given: Given, tmp_path: Path) -> None:
    journal = work(given, tmp_path / "out", "pruned-first")
    assert Checkpoint.open(tmp_path / "out/model").layers == 3
    assert given.perplexity(tmp_path / "out") < given.perplexity(given.release, without=(1,))
    assert len(journal.curve("loss")) == TRAINING["steps"]


@pytest.mark.parametrize("settings", [{}, ADAPTERS, {"teacher_top": 8}])
def test_pruned_first_has_the_candidates_channels_and_its_training(
    narrowing: Given, settings: dict[str, Any], tmp_path: Path
) -> None:
    journal = work(narrowing, tmp_path / "out", "pruned-first", **settings)
    made = Checkpoint.open(tmp_path / "out/model")
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert {name: made.config[name] for name in widths} == widths
    assert made.layers == 3
    before = narrowing.perplexity(narrowing.release, without=(1,), channels=CHANNELS)
    assert narrowing.perplexity(tmp_path / "out") < before
    assert len(journal.curve("loss")) == settings.get("steps", TRAINING["steps"])
    assert journal.curve("slices_ffn") == []


def test_dense_trained_has_all_channels(narrowing: Given, tmp_path: Path) -> None:
    journal = work(narrowing, tmp_path / "out", "dense-trained")
    made, release = Checkpoint.open(tmp_path / "out/model"), Checkpoint.open(narrowing.release / "model")
    assert made.config == release.config
    assert narrowing.perplexity(tmp_path / "out") < narrowing.perplexity(narrowing.release)
    assert journal.curve("slices_ffn") == []


def test_dense_trained_has_all_layers_and_the_same_training(given: Given, tmp_path: Path) -> None:
    journal = work(given, tmp_path / "out", "dense-trained")
    assert Checkpoint.open(tmp_path / "out/model").layers == 4
    assert given.perplexity(tmp_path / "out") < given.perplexity(given.release)
    assert len(journal.curve("loss")) == TRAINING["steps"]


@pytest.mark.parametrize("schedule", ["anneal", "penalty"])
def test_nothing_is_regularised_whatever_the_schedule(schedule: str, given: Given, tmp_path: Path) -> None:
    journal = work(given, tmp_path / "out", "dense-trained", schedule=schedule)
    assert journal.curve("penalty") == []


def test_where_the_candidate_is_fine_tuned_so_is_the_control(given: Given, tmp_path: Path) -> None:
    journal = work(given, tmp_path / "out", "pruned-first", recover={"enabled": True})
    assert len(journal.curve("validation")) > 0
    assert Checkpoint.open(tmp_path / "out/model").layers == 3


def test_a_control_that_was_killed_goes_on_in_the_training_it_was_at(given: Given, tmp_path: Path) -> None:
    kept = SeveralKept(tmp_path / "kept")
    with pytest.raises(Killed):
        work(given, tmp_path / "out", "pruned-first", Written(killed_at=5), kept, checkpoint_every=2)
    again = work(given, tmp_path / "out", "pruned-first", checkpoints=kept, checkpoint_every=2)
    assert [step for step, values in again.lines if "loss" in values] == [5, 6]
