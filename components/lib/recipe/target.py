"""The quality, speed or size that is asked for instead of a ratio."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from components.lib.recipe.choices import Transfers
from components.lib.recipe.section import Count, Rate, Section

LIMIT = 0.5
"""The largest ratio that is tried of a method for which the recipe names none."""

Figure = Literal["perplexity", "accuracy", "prefill", "bytes"]


class Target(Section):
    """The quality, speed or size that is asked for: one of the first four. The depth of the cut is then searched, up to the methods' ratios."""

    max_perplexity_ratio: Rate | None = Field(
        None, description="The candidate's perplexity over the dense model's, at most: remove as much as it allows."
    )
    min_accuracy_recovery: Rate | None = Field(
        None,
        description="The candidate's mean accuracy on evaluate.tasks over the dense model's, at least: remove as much as it allows. Searched by the accuracy of the next token.",
    )
    min_speedup: Rate | None = Field(
        None,
        description="The candidate's prefill throughput over the dense model's, at least: remove as little as gives it.",
    )
    max_bytes: Count | None = Field(
        None, description="Bytes of the candidate's weights, at most: remove as little as gives them."
    )
    transfer: Transfers = Field(
        Transfers(),
        description="The transfer that is applied before quality is measured; regularize.transfer when absent.",
    )

    @model_validator(mode="after")
    def _one(self) -> Target:
        if len(self._asked()) != 1:
            raise ValueError(f"target names {len(self._asked())} of {', '.join(_FIGURES)}: name exactly one")
        return self

    def _asked(self) -> dict[str, float]:
        return {name: value for name in _FIGURES if (value := getattr(self, name)) is not None}

    @property
    def field(self) -> str:
        """Return the name of the field that is set."""
        return next(iter(self._asked()))

    @property
    def bound(self) -> float:
        """Return its value."""
        return self._asked()[self.field]

    @property
    def figure(self) -> Figure:
        """Return what is measured."""
        return _FIGURES[self.field]

    @property
    def of_quality(self) -> bool:
        """Return True if less may be removed, so that the deepest cut that holds is wanted; else the shallowest is."""
        return self.figure in ("perplexity", "accuracy")


_FIGURES: dict[str, Figure] = {
    "max_perplexity_ratio": "perplexity",
    "min_accuracy_recovery": "accuracy",
    "min_speedup": "prefill",
    "max_bytes": "bytes",
}
