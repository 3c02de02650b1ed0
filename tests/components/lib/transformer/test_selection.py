"""What was chosen is told layer by layer, counted once, and comes back from its file."""

from __future__ import annotations

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
        axis="layers+hidden+heads",
        removed=(1,),
        order=(1,),
        scores={"gate": (1.0, 0.1)},
        channels=CHANNELS,
    )
    selection.save(tmp_path)
    assert Selection.load(tmp_path) == selection


def test_a_selection_of_layers_alone_needs_no_channels() -> None:
    """As runs before there were channels have left it."""
    made = Selection.model_validate_json('{"method": "sleb", "axis": "layers", "removed": [1], "order": [1]}')
    assert made.channels == NO_CHANNELS


def test_a_selection_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CHANNELS.hidden = ()  # type: ignore[misc]
