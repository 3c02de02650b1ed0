"""The rules that a candidate must pass, and who makes it champion if it does."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from components.lib.recipe.section import Name, Rate, Section

Floor = Literal["accuracy", "mean_accuracy", "prefill", "decode"]
"""Figures that should be high: the candidate's over the other model's is at least the bound."""
Ceiling = Literal["perplexity", "parameters", "bytes", "peak_memory"]
"""Figures that should be low: the candidate's over the other model's is at most the bound."""


class Rule(Section):
    """One rule: the candidate's figure over the same figure of another model stays within a bound.

    A figure that is missing, is no finite number, or was measured on another text, context length, number of examples or without
    a known version of lm-eval fails its rule.
    """

    figure: Literal[Ceiling, Floor] = Field(
        description="What is compared. At most the bound: perplexity (of each text), parameters, bytes (of the stored weights), peak_memory (of weights, cache and activations, at prefill of the largest batch). "
        "At least the bound: accuracy (of each task) and mean_accuracy (over the tasks), each less one standard error of the ratio, prefill and decode (tokens per second at each batch size)."
    )
    against: Literal["dense", "champion", "pruned-first", "dense-trained"] = Field(
        "dense", description="The other model. A rule against the champion holds if there is none yet."
    )
    bound: Rate = Field(description="The ratio that the candidate may just reach.")
    on: tuple[str, ...] = Field(
        (), description="The texts, tasks or batch sizes that the rule applies to; all when absent."
    )
    why: str = Field(description="The reason for the rule, in one line; the report shows it.", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _batch_sizes(cls, value: Any) -> Any:
        """Take batch sizes in `on` as they are written, as numbers."""
        if isinstance(value, dict) and isinstance(value.get("on"), list | tuple):
            value = value | {"on": tuple(str(one) if isinstance(one, int) else one for one in value["on"])}
        return value

    @model_validator(mode="after")
    def _applies(self) -> Rule:
        if self.on and self.figure in ("mean_accuracy", "parameters", "bytes", "peak_memory"):
            raise ValueError(f"{self.figure} is one number for the whole model: leave out 'on'")
        if "\n" in self.why:
            raise ValueError("'why' is one line: leave out the line breaks")
        return self

    @property
    def at_least(self) -> bool:
        """Return True if the figure should be high."""
        return self.figure in get_args(Floor)


class Promote(Section):
    """When a candidate becomes challenger, and when champion."""

    approval: Literal["manual", "auto"] = Field(
        "manual",
        description="manual: a candidate that passes becomes challenger and waits for espalier promote. auto: the run itself promotes it.",
    )
    require_signature: bool = Field(
        False, description="Whether a candidate without an OpenSSF signature that holds fails, and cannot be promoted."
    )
    rules: dict[Name, Rule] = Field(
        {}, description="The rules by name; a candidate that passes all of them becomes challenger."
    )
