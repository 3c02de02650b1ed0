"""The methods: each chooses layers or channels to remove. One file each, with its settings, checks, choice and part of the report.

A method is found by its file: the folder is the list of methods. Its settings are its fields, so a recipe says

    methods:
      trsp: {ratio: 0.25, shortlist: 4}

Nothing here imports torch, so that a recipe is read quickly; a method imports torch when its work starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from components.lib.errors import Refusal
from components.lib.plugins import classes_of
from components.lib.recipe.section import Fraction, Section
from components.lib.report_parts import Part
from components.lib.training.journal import Journal
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.removal import Along, Removal
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from components.lib.recipe.training import Regularize


class Method(Section):
    """A method: its settings are its fields, and `choose` chooses the layers or channels to remove."""

    name: ClassVar[str]
    """The method's name in a recipe."""
    title: ClassVar[str]
    """The method's name in a sentence, such as SLEB."""
    removes: ClassVar[Literal["layers", "channels"]]
    scores: ClassVar[Mapping[str, str]] = {}
    """The meaning of each score that the method gives a layer. A low score means that the layer is little needed."""

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Check before any work that the method can be applied to the checkpoint.

        Raises:
            Refusal: the ratio leaves nothing, or the family does not allow the removal.
        """

    def check_training(self, regularize: Regularize) -> None:
        """Raise ValueError if the method and the recipe's training cannot be combined."""

    def asked(self, axis: Along) -> float | None:
        """Return the part of an axis that the settings ask to remove; None if they name no part of it."""
        return None

    def rounding(self, removal: Removal) -> str:
        """Return why the removed part differs from the asked one, such as `rounded to whole layers`."""
        return ""

    def parts(self, selection: Selection, folder: Path) -> Sequence[Part]:
        """Return the method's part of the report's section on the removal.

        Args:
            selection: the whole selection.
            folder: the files that `choose` left.
        """
        return ()

    def choose(
        self, model: PreTrainedModel, windows: Tensor, before: Selection, *, journal: Journal, out: Path | None
    ) -> Selection:
        """Choose the layers or channels of the model to remove.

        Args:
            model: the dense model, unchanged afterwards.
            windows: token ids (windows, length) to measure on.
            before: the selection of the methods before this one, which is kept.
            journal: takes curves and progress.
            out: an existing folder for the method's other files; None writes none.
        """
        raise NotImplementedError


class LayerMethod(Method):
    """A method that removes whole layers."""

    removes: ClassVar[Literal["layers", "channels"]] = "layers"

    ratio: Fraction = Field(
        description="The part of the layers to remove: 0.25 of 12 layers removes 3. Rounded to whole layers, at least one."
    )

    def check(self, checkpoint: PrunableCheckpoint) -> None:
        """Refuse a ratio that leaves no layer of the checkpoint, or none of those that its family lets go."""
        count, family = self.count(checkpoint.layers), checkpoint.family
        removable = family.removable(checkpoint.config)
        if count >= len(removable):
            raise Refusal(
                f"methods.{self.name}.ratio {self.ratio} removes {count} layers, but of {family.title} at most {len(removable) - 1} of "
                f"{checkpoint.layers} can be removed, since {family.why_fixed}: use a smaller ratio"
            )

    def asked(self, axis: Along) -> float | None:
        """Return the ratio for the axis of layers."""
        return self.ratio if axis == "layers" else None

    def rounding(self, removal: Removal) -> str:
        """Return that whole layers are removed."""
        return "rounded to whole layers"

    def count(self, layers: int) -> int:
        """Return how many of `layers` layers are removed: the nearest whole number (halves up), at least one.

        Raises:
            Refusal: no layer would stay.
        """
        count = max(1, int(self.ratio * layers + 0.5))
        if count >= layers:
            raise Refusal(
                f"methods.{self.name}.ratio {self.ratio} removes {count} of the model's {layers} layers, which leaves none: "
                "use a smaller ratio or a deeper model"
            )
        return count


BatchSize = Annotated[int, Field(ge=1, description="Windows a forward pass; fewer take less memory.")]


def sample(windows: Tensor) -> Tensor:
    """Return as many of the windows (windows, length) as hold MEASURED_TOKENS, at least one."""
    # The windows are in random order, so the first ones are a fair sample.
    return windows[: max(1, MEASURED_TOKENS // windows.shape[1])]


MEASURED_TOKENS = 32_768
"""Tokens on which each removal is measured. All use the same tokens, so differences show long before the values converge."""


@cache
def known_methods() -> dict[str, type[Method]]:
    """Return every method's class by its name in a recipe, sorted by name."""
    return classes_of(__name__, Path(__file__).parent, Method)
