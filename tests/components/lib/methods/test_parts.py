"""What TRSP and DReSS add to the report, from their own settings and the files they left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.lib.methods.dress import Dress
from components.lib.methods.sleb import Sleb
from components.lib.methods.trsp import Trsp
from components.lib.methods.trsp.report import Round, read_trajectory
from components.lib.report_parts import Lines, Sentence
from components.lib.transformer.removal import Removal
from components.lib.transformer.selection import NOTHING, Channels, Selection

REMOVED = (5, 3)
LAYERS = Selection.of_layers("trsp", REMOVED)
CHANNELS = Selection(method="dress", channels=Channels(ffn=((0, 1),) * 6))


@pytest.fixture
def trajectory(tmp_path: Path) -> Path:
    """Two rounds of four steps over six layers; the gate of the layer that the first removed is 0 in the second."""
    with (tmp_path / "trajectory.jsonl").open("w") as file:
        for step in range(8):
            gates = [0.0 if step > 3 and layer == REMOVED[0] else 1 - layer * step / 50 for layer in range(6)]
            file.write(json.dumps({"round": step // 4, "step": step + 1, "gates": gates}) + "\n")
    return tmp_path


def test_the_gates_of_removed_layers_stand_out_and_end_where_they_were_removed(trajectory: Path) -> None:
    (part,) = Trsp(ratio=0.25).parts(LAYERS, trajectory)
    assert isinstance(part, Lines)
    assert [line.name for line in part.lines if line.stands_out] == ["layer 3", "layer 5"]
    assert [len(part.lines[layer].points) for layer in (5, 3, 0)] == [4, 8, 8]
    assert [mark.x for mark in part.marks] == [4.5]
    assert part.summary == "Gates of 6 layers over 8 steps"


def test_a_gate_that_is_not_a_number_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "trajectory.jsonl").write_text('{"round": 0, "step": 1, "gates": [NaN, 0.5]}\n')
    assert read_trajectory(tmp_path) == [Round(0, 1, (None, 0.5))]


def test_a_method_without_gates_and_channels_adds_nothing(tmp_path: Path) -> None:
    assert list(Sleb(ratio=0.25).parts(LAYERS, tmp_path)) == []
    assert list(Trsp(ratio=0.25).parts(NOTHING, tmp_path)) == []


@pytest.mark.parametrize(
    ("channels", "words"),
    [("random", "drawn at random"), ("magnitude", "smallest weights."), ("activation", "weights × activations")],
)
def test_the_choice_of_channels_is_explained(channels: str, words: str, tmp_path: Path) -> None:
    (part,) = Dress.model_validate({"ratio": 0.5, "channels": channels}).parts(CHANNELS, tmp_path)
    assert isinstance(part, Sentence)
    assert words in part.text


@pytest.mark.parametrize(
    ("removal", "said"),
    [
        (Removal("ffn", 684, 340), "rounded: a multiple of 8 stays"),
        (Removal("ffn", 684, 342), "rounded to whole heads, with which it shrinks"),
        (Removal("heads", 4, 3), "rounded to whole key-value groups"),
    ],
)
def test_dress_says_what_a_width_was_rounded_to(removal: Removal, said: str) -> None:
    assert Dress(ratio=0.5).rounding(removal) == said
