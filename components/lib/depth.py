"""How deep a recipe with a target cuts: the depths that are tried, and the record of the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.lib.errors import Refusal
from components.lib.methods import LayerMethod, Method
from components.lib.recipe.target import Target
from components.lib.transformer.checkpoint import PrunableCheckpoint

FILE = "search.json"
STEPS = 16
"""How many depths there are if channels are removed; of layers alone, there is one for each layer."""

Ratios = Mapping[str, float | dict[str, float]]
"""The ratio of each method, or one for each axis, by the method's name."""


class Point(BaseModel):
    """A depth that was measured."""

    model_config = ConfigDict(frozen=True)

    part: float
    """Of the recipe's ratios, between 0 and 1."""
    ratios: dict[str, float | dict[str, float]]
    value: float
    """The figure of the target: a ratio to the dense model, or bytes."""
    holds: bool


class Search(BaseModel):
    """The record of a search, in `search.json`."""

    model_config = ConfigDict(frozen=True)

    field: str
    """The field of `target` that was asked for."""
    bound: float
    points: tuple[Point, ...]
    """In the order of their depth."""
    part: float
    """The depth that was chosen."""
    next: dict[str, float | dict[str, float]] | None
    """The ratios of the next safer depth; None if there is none."""

    @property
    def chosen(self) -> Point:
        """Return the point that was chosen."""
        return next(point for point in self.points if point.part == self.part)

    def save(self, folder: Path) -> None:
        """Write `search.json`."""
        (folder / FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Search | None:
        """Read `search.json`; None if nothing was searched."""
        file = folder / FILE
        return cls.model_validate_json(file.read_text()) if file.is_file() else None


class Depth(BaseModel):
    """A depth that can be tried."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    part: float
    methods: tuple[Any, ...]
    """The recipe's methods with their ratios at this depth."""

    @property
    def ratios(self) -> dict[str, float | dict[str, float]]:
        """Return the methods' ratios."""
        return {method.name: vars(method)["ratio"] for method in self.methods}


def holds(target: Target, value: float) -> bool:
    """Return True if a measured value is within the target's bound; NaN is not."""
    return value <= target.bound if target.figure in ("perplexity", "bytes") else value >= target.bound


def in_words(ratios: Ratios) -> str:
    """Return ratios as settings of a recipe.

    >>> in_words({"trsp": 0.125})
    'methods.trsp.ratio 0.125'
    """
    written = {name: f"{ratio:.4g}" if isinstance(ratio, float) else str(ratio) for name, ratio in ratios.items()}
    return ", ".join(f"methods.{name}.ratio {ratio}" for name, ratio in written.items())


def depths(methods: Sequence[Method], checkpoint: PrunableCheckpoint) -> list[Depth]:
    """Return the depths up to the methods' ratios, the least first: every ratio times k / n.

    n is the number of layers that the ratio removes, or STEPS if channels are removed. A depth that the checkpoint does not allow,
    such as a width that no part of the heads gives, is left out.

    Raises:
        Refusal: the checkpoint allows none.
    """
    only = methods[0] if len(methods) == 1 else None
    steps = only.count(checkpoint.layers) if isinstance(only, LayerMethod) else STEPS
    found: list[Depth] = []
    refusals: list[Refusal] = []
    for step in range(1, steps + 1):
        scaled = tuple(_scaled(method, step / steps) for method in methods)
        try:
            for method in scaled:
                method.check(checkpoint)
        except Refusal as refusal:
            refusals.append(refusal)
        else:
            found.append(Depth(part=step / steps, methods=scaled))
    if not found:
        raise refusals[-1]
    return found


def _scaled(method: Method, part: float) -> Method:
    ratio = vars(method)["ratio"]
    scaled = {axis: one * part for axis, one in ratio.items()} if isinstance(ratio, Mapping) else ratio * part
    return method.model_copy(update={"ratio": scaled})
