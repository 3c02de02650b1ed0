"""What a selection takes from a model along each axis: in numbers and in words, never index by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from components.lib.transformer.layout import Axis, Widths
from components.lib.transformer.selection import AXES, Selection

Along = Axis | Literal["layers"]
"""What a model can be made smaller along."""

ALONG: tuple[Along, ...] = ("layers", *AXES)

NOUNS: Mapping[Along, str] = {
    "layers": "layers",
    "hidden": "hidden channels",
    "ffn": "ffn channels a layer",
    "heads": "key-value groups a layer",
}
"""What is counted along an axis."""


@dataclass(frozen=True)
class Removal:
    """What goes along one axis."""

    axis: Along
    before: int
    """What the release has: layers, channels of the residual stream, or (ffn, heads) channels and groups of one layer."""
    removed: int

    @property
    def after(self) -> int:
        """What stays."""
        return self.before - self.removed

    @property
    def part(self) -> float:
        """The part that goes."""
        return self.removed / self.before

    def __str__(self) -> str:
        """Return it as a person says it: 256 of 1,024 ffn channels a layer."""
        return f"{self.removed:,} of {self.before:,} {NOUNS[self.axis]}"


def removals(selection: Selection, layers: int, widths: Widths | None) -> list[Removal]:
    """Return what goes along each axis along which anything goes, layers first.

    Args:
        selection: what was selected.
        layers: of the release.
        widths: of the release; None where they are not known, and only layers can go.
    """
    found = [Removal("layers", layers, len(selection.removed))]
    if widths is not None:
        found += [Removal(axis, widths.of(axis), selection.channels.count(axis)) for axis in AXES]
    return [removal for removal in found if removal.removed]


def in_words(found: Sequence[Removal]) -> str:
    """Return removals as a part of a sentence.

    >>> in_words([Removal("layers", 12, 3), Removal("hidden", 256, 64), Removal("ffn", 1024, 256)])
    '3 of 12 layers, 64 of 256 hidden channels and 256 of 1,024 ffn channels a layer'
    """
    *others, last = [str(removal) for removal in found] or ["nothing"]
    return f"{', '.join(others)} and {last}" if others else last


def percent(part: float) -> str:
    """Return a part as a person reads it.

    >>> percent(0.25), percent(0.2515)
    ('25 %', '25.1 %')
    """
    return f"{100 * part:.1f}".removesuffix(".0") + " %"
