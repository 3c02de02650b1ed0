"""What was chosen is told layer by layer, counted once, and comes back from its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from components.lib.transformer.selection import NO_CHANNELS, NOTHING, Channels, Selection

CHANNELS = Channels(hidden=(1, 2, 5), heads=((0,), (1,)))


def test_a_layer_loses_its_own_channels_and_those_of_the_stream() -> None:
    assert CHANNELS.at(0) == {"hidden": (1, 2, 5), "ffn": (), "heads": (0,)}
    assert CHANNELS.at(1) == {"hidden": (1, 2, 5), "ffn": (), "heads": (1,)}


def test_what_is_outside_the_layers_loses_those_of_the_stream() -> None:
    assert CHANNELS.at(None) == {"hidden": (1, 2, 5)}


def test_channels_are_counted_in_one_layer() -> None:
    assert [CHANNELS.count(axis) for axis in ("hidden", "ffn", "heads")] == [3, 0, 1]
    assert CHANNELS.axes == ("hidden", "heads")


def test_no_channels_are_false() -> None:
    assert CHANNELS
    assert not NO_CHANNELS
    assert not NOTHING.channels
    assert NO_CHANNELS.axes == ()


def test_a_selection_comes_back_from_its_file(tmp_path: Path) -> None:
    selection = Selection(
        method="trsp+dress",
        removed=(1,),
        order=(1,),
        scores={"gate": (1.0, 0.1)},
        channels=CHANNELS,
    )
    selection.save(tmp_path)
    assert Selection.load(tmp_path) == selection


def test_what_is_removed_and_how_it_was_chosen_are_files_apart(tmp_path: Path) -> None:
    """So that the same layers, chosen otherwise, train nothing again."""
    for name, order, score in (("sleb", (4, 1), 9.5), ("trsp", (1, 4), 0.2)):
        (tmp_path / name).mkdir()
        Selection.of_layers(name, order, {"perplexity": [score] * 6}).save(tmp_path / name)
    what = [(tmp_path / name / "selection.json").read_bytes() for name in ("sleb", "trsp")]
    how = [json.loads((tmp_path / name / "choice.json").read_text()) for name in ("sleb", "trsp")]
    assert what[0] == what[1]
    assert json.loads(what[0]).keys() == {"removed", "channels"}
    assert [(one["method"], one["order"]) for one in how] == [("sleb", [4, 1]), ("trsp", [1, 4])]


def test_what_is_removed_is_read_without_how_it_was_chosen(tmp_path: Path) -> None:
    selection = Selection.of_layers("sleb", (4, 1)).with_channels("dress", CHANNELS)
    selection.save(tmp_path)
    (tmp_path / "choice.json").unlink()
    assert Selection.load(tmp_path) == Selection(removed=(1, 4), channels=CHANNELS)


def test_layers_are_kept_in_their_order_of_removal_and_ascending() -> None:
    selection = Selection.of_layers("sleb", [4, 1])
    assert (selection.method, selection.removed, selection.order) == ("sleb", (1, 4), (4, 1))
    assert (selection.scores, selection.channels) == ({}, NO_CHANNELS)


def test_channels_are_added_to_what_was_chosen_before() -> None:
    layers = Selection.of_layers("sleb", [4, 1], {"perplexity": [1.0] * 6})
    both = layers.with_channels("dress", CHANNELS)
    assert (both.method, both.channels) == ("sleb+dress", CHANNELS)
    assert (both.removed, both.order, both.scores) == (layers.removed, layers.order, layers.scores)
    assert NOTHING.with_channels("dress", CHANNELS).method == "dress"


def test_a_selection_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CHANNELS.hidden = ()  # type: ignore[misc]
