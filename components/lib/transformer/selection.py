"""The layers and channels that the methods chose to remove."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from components.lib.transformer.layout import Axis

AXES: tuple[Axis, ...] = ("hidden", "ffn", "heads")


class Channels(BaseModel):
    """The channels to remove, by their indices in the release, ascending. Every layer that stays loses as many; a removed layer has none listed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: tuple[int, ...] = ()
    """Channels of the residual stream, the same in every layer."""
    ffn: tuple[tuple[int, ...], ...] = ()
    """Intermediate channels, a tuple for each layer of the release; () if the axis is not cut."""
    heads: tuple[tuple[int, ...], ...] = ()
    """Key-value groups, a tuple for each layer of the release; () if the axis is not cut."""

    def __bool__(self) -> bool:
        return bool(self.hidden or self.ffn or self.heads)

    def at(self, layer: int | None) -> dict[Axis, tuple[int, ...]]:
        """Return the channels to remove from the tensors of a layer, or, if `layer` is None, from those outside the layers."""
        removed: dict[Axis, tuple[int, ...]] = {"hidden": self.hidden}
        if layer is not None:
            removed |= {"ffn": self.ffn[layer] if self.ffn else (), "heads": self.heads[layer] if self.heads else ()}
        return removed

    def count(self, axis: Axis) -> int:
        """Return how many channels of an axis are removed: of ffn and heads, from each layer."""
        of_axis = getattr(self, axis)
        return len(of_axis) if axis == "hidden" else max(map(len, of_axis), default=0)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that lose channels, in the order of `AXES`."""
        return tuple(axis for axis in AXES if self.count(axis))


NO_CHANNELS = Channels()


class Selection(BaseModel):
    """The layers and channels to remove, and the measurements that led to them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    """The methods that chose, joined by +."""
    axis: str = "layers"
    """The axes that are cut: layers, hidden, ffn, heads, or several of them joined by +."""
    removed: tuple[int, ...] = ()
    """Indices of the layers to remove, ascending."""
    order: tuple[int, ...] = ()
    """The same layers in the order of their removal, first removed first."""
    scores: dict[str, tuple[float, ...]] = {}
    """The scores that a method measured, by name: one number a layer, such as `gate`, `block_influence` or `perplexity`."""
    channels: Channels = NO_CHANNELS
    """The channels to remove."""

    def save(self, folder: Path) -> None:
        """Write `selection.json`."""
        (folder / "selection.json").write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Selection:
        """Read `selection.json`."""
        return cls.model_validate_json((folder / "selection.json").read_text())


NOTHING = Selection(method="none")
"""Nothing is removed: the selection of the dense model's training."""
