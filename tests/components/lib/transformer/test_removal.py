"""What goes along each axis is counted of the release, and said as a person says it."""

from __future__ import annotations

from components.lib.transformer.layout import Widths
from components.lib.transformer.removal import Removal, in_words, removals
from components.lib.transformer.selection import NOTHING, Channels, Selection

WIDTHS = Widths(hidden=64, ffn=1024, heads=8, groups=4, head=8)
CHANNELS = Channels(hidden=(1, 2), ffn=(tuple(range(256)),) * 6, heads=((0,),) * 6)


def test_layers_come_first_and_an_axis_that_keeps_all_is_left_out() -> None:
    found = removals(Selection(method="trsp+dress", removed=(1, 4), channels=CHANNELS), 6, WIDTHS)
    assert found == [
        Removal("layers", 6, 2),
        Removal("hidden", 64, 2),
        Removal("ffn", 1024, 256),
        Removal("heads", 4, 1),
    ]
    assert [(removal.after, removal.part) for removal in found] == [(4, 1 / 3), (62, 1 / 32), (768, 0.25), (3, 0.25)]
    assert removals(Selection(method="trsp", removed=(1, 4)), 6, WIDTHS) == found[:1]


def test_where_no_widths_are_known_layers_are_all_that_can_go() -> None:
    assert removals(Selection(method="trsp", removed=(0,)), 6, None) == [Removal("layers", 6, 1)]


def test_it_is_said_in_words() -> None:
    found = removals(Selection(method="trsp+dress", removed=(1, 4), channels=CHANNELS), 6, WIDTHS)
    assert in_words(found) == (
        "2 of 6 layers, 2 of 64 hidden channels, 256 of 1,024 ffn channels a layer and 1 of 4 key-value groups a layer"
    )
    assert in_words(found[:1]) == "2 of 6 layers"
    assert in_words(removals(NOTHING, 6, WIDTHS)) == "nothing"
