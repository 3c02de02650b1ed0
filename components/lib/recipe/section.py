"""A section of the recipe, and the types of its fields: shared by the schema, the methods and the transfers."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _addressable(name: str) -> str:
    """Refuse a dot, which would split the name inside a dotted one such as `--set evaluate.perplexity.NAME=FILE`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{name!r} cannot name a text: use letters, digits, '_' and '-'")
    return name


Name = Annotated[str, AfterValidator(_addressable)]


class Section(BaseModel):
    """A part of the recipe: immutable, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def descend(settings: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """Return the mapping that holds the dotted name's last part, made if it is missing, and that part."""
    *path, leaf = dotted.split(".")
    for part in path:
        if not isinstance(settings.get(part), dict):
            settings[part] = {}
        settings = settings[part]
    return settings, leaf
