"""Prune leaves a plain checkpoint without the chosen layers, its card, and the proof; or it leaves nothing that counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from components.lib.transformer.checkpoint import Checkpoint
from components.lib.transformer.export import VerificationError
from components.lib.transformer.selection import Channels
from components.lib.transformer.surgery import cut_checkpoint
from components.prune import prune as stage
from components.prune.card import front_matter
from components.prune.prune import prune
from tests.components.given import CHANNELS, Given, weights
from tests.components.lib.training.tiny import Written
from tests.components.lib.transformer.zoo import release_with_head

LINEAGE = {"source": "owner/model", "revision": "0" * 40, "digest": "a" * 64}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given.lay(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def narrowing(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A run whose selection has channels too."""
    return Given.lay(tmp_path_factory.mktemp("run"), CHANNELS)


def work(given: Given, out: Path, release: Path | None = None, **lineage: object) -> Written:
    out.mkdir()
    journal = Written()
    prune(
        release or given.release,
        given.release,
        given.selection,
        lineage=LINEAGE | lineage,
        made_by={"methods": {"sleb": {"ratio": 0.25}}},
        out=out,
        journal=journal,
    )
    return journal


def test_the_checkpoint_has_the_other_layers_and_nothing_else_changed(given: Given, tmp_path: Path) -> None:
    journal = work(given, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out/model").layers == 3
    assert given.perplexity(tmp_path / "out") == pytest.approx(given.perplexity(given.release, without=(1,)))
    before, after = weights(given.release), weights(tmp_path / "out")
    assert after["model.layers.1.mlp.up_proj.weight"].equal(before["model.layers.2.mlp.up_proj.weight"])
    assert after["model.embed_tokens.weight"].equal(before["model.embed_tokens.weight"])
    assert journal.done[-1] == (2, 2)


def test_the_checkpoint_has_the_other_channels_and_nothing_else_changed(narrowing: Given, tmp_path: Path) -> None:
    work(narrowing, tmp_path / "out")
    made = Checkpoint.open(tmp_path / "out/model")
    assert (made.layers, made.config["hidden_size"], made.config["intermediate_size"]) == (3, 16, 32)
    before = narrowing.perplexity(narrowing.release, (1,), CHANNELS)
    assert narrowing.perplexity(tmp_path / "out") == pytest.approx(before, rel=1e-4)
    up = weights(narrowing.release)["model.layers.2.mlp.up_proj.weight"]
    assert weights(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"].equal(up[16:, 1::2])


def test_what_was_proved_is_told(given: Given, tmp_path: Path) -> None:
    work(given, tmp_path / "out")
    told = json.loads((tmp_path / "out/verification.json").read_text())
    assert (told["removed"], told["layers"], told["max_difference"]) == ([1], 3, 0.0)
    assert told["channels"] == {}


def test_the_channels_that_were_proved_to_be_removed_are_counted_by_axis(narrowing: Given, tmp_path: Path) -> None:
    work(narrowing, tmp_path / "out")
    told = json.loads((tmp_path / "out/verification.json").read_text())
    assert told["channels"] == {
        "hidden": {"before": 32, "after": 16, "removed": 16},
        "ffn": {"before": 48, "after": 32, "removed": 16},
        "heads": {"before": 2, "after": 1, "removed": 1},
    }
    card = (tmp_path / "out/model/README.md").read_text()
    assert "| ffn channels a layer | 32 of 48, 16 removed |" in card


def test_heads_of_the_release_that_are_dropped_are_told(given: Given, tmp_path: Path) -> None:
    """The regularised model does not have them any more."""
    release_with_head("qwen3_next", tmp_path / "release/model")
    work(given, tmp_path / "out", release=tmp_path / "release")
    verification = json.loads((tmp_path / "out/verification.json").read_text())
    assert verification["dropped"] == ["mtp.fc.weight"]
    card = (tmp_path / "out/model/README.md").read_text()
    assert "1 tensor of heads for multi-token prediction, such as `mtp.fc.weight`" in card


def test_heads_that_a_gguf_file_was_pinned_without_are_told(given: Given, tmp_path: Path) -> None:
    """The snapshot has none of them: the release's lineage names them."""
    work(given, tmp_path / "out", gguf="Q8_0", heads=["blk.4.nextn.eh_proj.weight", "blk.4.attn_q.weight"])
    verification = json.loads((tmp_path / "out/verification.json").read_text())
    assert verification["dropped"] == ["blk.4.nextn.eh_proj.weight", "blk.4.attn_q.weight"]
    card = (tmp_path / "out/model/README.md").read_text()
    assert "2 tensors of heads for multi-token prediction, such as `blk.4.nextn.eh_proj.weight`" in card


def test_the_card_tells_release_licence_and_recipe(given: Given, tmp_path: Path) -> None:
    work(given, tmp_path / "out")
    card = (tmp_path / "out/model/README.md").read_text()
    head = front_matter(card)
    assert (head["base_model"], head["license"]) == ("owner/model", "mit")
    assert "ratio: 0.25" in card


def test_a_cut_that_is_not_the_one_asked_for_is_not_published(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cuts_another(source: Path, out: Path, layers: Sequence[int], channels: Channels) -> None:
        cut_checkpoint(source, out, [layer + 1 for layer in layers], channels)

    monkeypatch.setattr(stage, "cut_checkpoint", cuts_another)
    with pytest.raises(VerificationError):
        work(given, tmp_path / "out")
    assert not (tmp_path / "out/verification.json").exists()


def test_a_cut_of_channels_that_are_not_those_asked_for_is_not_published(
    narrowing: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cuts_another(source: Path, out: Path, layers: Sequence[int], channels: Channels) -> None:
        others = tuple(tuple(channel + 1 for channel in gone) for gone in channels.ffn)
        cut_checkpoint(source, out, layers, channels.model_copy(update={"ffn": others}))

    monkeypatch.setattr(stage, "cut_checkpoint", cuts_another)
    with pytest.raises(VerificationError, match=r"holds another layers\.0\.mlp"):
        work(narrowing, tmp_path / "out")
    assert not (tmp_path / "out/verification.json").exists()
