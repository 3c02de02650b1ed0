"""How much a selection removes along each axis, in numbers and in words, without the indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from components.lib.transformer.layout import Axis, Widths
from components.lib.transformer.selection import ALL_AXES, Selection

Along = Axis | Literal["layers"]
"""An axis along which a model can be cut."""

ALONG: tuple[Along, ...] = ("layers", *ALL_AXES)

NOUNS: Mapping[Along, str] = {
    "layers": "layers",
    "hidden": "hidden channels",
    "ffn": "ffn channels a layer",
    "heads": "key-value groups a layer",
    "experts": "experts a layer",
}
"""The unit of each axis."""


@dataclass(frozen=True)
class Removal:
    """How much is removed along one axis."""

    axis: Along
    before: int
    """The release's number of layers, of channels of the residual stream, or of channels, groups or experts of one layer."""
    removed: int

    @property
    def after(self) -> int:
        """How many stay."""
        return self.before - self.removed

    @property
    def part(self) -> float:
        """The removed part, between 0 and 1."""
        return self.removed / self.before

    def __str__(self) -> str:
        """Return it in words: 256 of 1,024 ffn channels a layer."""
        return f"{self.removed:,} of {self.before:,} {NOUNS[self.axis]}"


def removals(selection: Selection, layers: int, widths: Widths | None) -> list[Removal]:
    """Return the removal along each axis that is cut, layers first.

    Args:
        selection: the layers and channels to remove.
        layers: the release's number of layers.
        widths: the release's; None if they are not known, and only layers can be removed.
    """
    found = [Removal("layers", layers, len(selection.removed))]
    if widths is not None:
        found += [Removal(axis, widths.of(axis), selection.channels.count(axis)) for axis in ALL_AXES]
    return [removal for removal in found if removal.removed]


def in_words(found: Sequence[Removal]) -> str:
    """Return removals as a part of a sentence.

    >>> in_words([Removal("layers", 12, 3), Removal("hidden", 256, 64), Removal("ffn", 1024, 256)])
    '3 of 12 layers, 64 of 256 hidden channels and 256 of 1,024 ffn channels a layer'
    """
    *others, last = [str(removal) for removal in found] or ["nothing"]
    return f"{', '.join(others)} and {last}" if others else last


def percent(part: float) -> str:
    """Return a part in per cent, with one decimal if it needs one.

    >>> percent(0.25), percent(0.2515)
    ('25 %', '25.1 %')
    """
    return f"{100 * part:.1f}".removesuffix(".0") + " %"
