"""What a method chose to remove."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Selection(BaseModel):
    """The layers to remove, and how the method came to them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    axis: Literal["layers"] = "layers"
    removed: tuple[int, ...]
    """Indices of the layers to remove, ascending."""
    order: tuple[int, ...]
    """The same layers in the order of their removal, first removed first."""
    scores: dict[str, tuple[float, ...]] = {}
    """What the method measured, by name: one number a layer, such as `gate`, `block_influence` or `perplexity`."""

    def save(self, folder: Path) -> None:
        """Write `selection.json`."""
        (folder / "selection.json").write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Selection:
        """Read `selection.json`."""
        return cls.model_validate_json((folder / "selection.json").read_text())
