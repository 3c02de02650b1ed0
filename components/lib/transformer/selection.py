"""The layers, channels and experts that the methods chose to remove."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from components.lib.transformer.layout import Axis

AXES: tuple[Axis, ...] = ("hidden", "ffn", "heads")
"""The axes of a layout, along which tensors become narrower."""

ALL_AXES: tuple[Axis, ...] = (*AXES, "experts")


class Channels(BaseModel):
    """The channels and experts to remove, by their indices in the release, ascending.

    Every layer that stays, and has some, loses as many; a removed layer has none listed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: tuple[int, ...] = ()
    """Channels of the residual stream, the same in every layer."""
    ffn: tuple[tuple[int, ...], ...] = ()
    """Intermediate channels, a tuple for each layer of the release; () if the axis is not cut."""
    heads: tuple[tuple[int, ...], ...] = ()
    """Key-value groups, a tuple for each layer of the release; () if the axis is not cut."""
    experts: tuple[tuple[int, ...], ...] = ()
    """Routed experts, a tuple for each layer of the release, empty for one without experts; () if the axis is not cut."""

    def __bool__(self) -> bool:
        return bool(self.narrow or self.experts)

    @property
    def narrow(self) -> bool:
        """Whether tensors become narrower, and not fewer alone."""
        return bool(self.hidden or self.ffn or self.heads)

    def at(self, layer: int | None) -> dict[Axis, tuple[int, ...]]:
        """Return the channels to remove from the tensors of a layer, or, if `layer` is None, from those outside the layers."""
        removed: dict[Axis, tuple[int, ...]] = {"hidden": self.hidden}
        if layer is not None:
            removed |= {"ffn": self.ffn[layer] if self.ffn else (), "heads": self.heads[layer] if self.heads else ()}
        return removed

    def experts_at(self, layer: int) -> tuple[int, ...]:
        """Return the experts to remove from a layer."""
        return self.experts[layer] if self.experts else ()

    def count(self, axis: Axis) -> int:
        """Return how many channels of an axis are removed: of ffn, heads and experts, from each layer."""
        of_axis = getattr(self, axis)
        return len(of_axis) if axis == "hidden" else max(map(len, of_axis), default=0)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that lose channels, in the order of `ALL_AXES`."""
        return tuple(axis for axis in ALL_AXES if self.count(axis))


NO_CHANNELS = Channels()


class Selection(BaseModel):
    """The layers and channels to remove, and the measurements that led to them.

    It is stored in two files, so that the stages that train and cut depend on the first alone: the same layers, chosen again by
    another method or with other scores, train nothing again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    removed: tuple[int, ...] = ()
    """Indices of the layers to remove, ascending."""
    channels: Channels = NO_CHANNELS
    """The channels to remove."""
    method: str = ""
    """The methods that chose, joined by + if there are two."""
    order: tuple[int, ...] = ()
    """The removed layers in the order of their removal, first removed first."""
    scores: dict[str, tuple[float, ...]] = {}
    """Measurements of a method, by name: one number a layer, such as `gate`, `block_influence` or `perplexity`."""

    @classmethod
    def of_layers(
        cls, method: str, order: Sequence[int], scores: Mapping[str, Sequence[float]] | None = None
    ) -> Selection:
        """Return the selection of some layers, in the order of their removal."""
        measured = {name: tuple(values) for name, values in (scores or {}).items()}
        return cls(method=method, removed=tuple(sorted(order)), order=tuple(order), scores=measured)

    def with_channels(self, method: str, channels: Channels) -> Selection:
        """Return the selection that removes `channels` too."""
        methods = "+".join(filter(None, (self.method, method)))
        return self.model_copy(update={"method": methods, "channels": channels})

    def save(self, folder: Path) -> None:
        """Write `selection.json` (what is removed) and `choice.json` (how it was chosen)."""
        (folder / WHAT).write_text(self.model_dump_json(indent=2, include=_REMOVED) + "\n")
        (folder / HOW).write_text(self.model_dump_json(indent=2, exclude=_REMOVED) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Selection:
        """Read `selection.json`, and `choice.json` if it is there."""
        found = [json.loads((folder / name).read_text()) for name in (WHAT, HOW) if (folder / name).is_file()]
        return cls.model_validate(dict(field for part in found for field in part.items()))


WHAT, HOW = "selection.json", "choice.json"
"""The files of a selection."""

_REMOVED = {"removed", "channels"}


NOTHING = Selection()
"""The selection of the dense model's own training: nothing is removed."""
