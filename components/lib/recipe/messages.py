"""The messages for errors of a recipe: one sentence that names the field, its value and the cure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from components.lib.given_yaml import short
from components.lib.recipe.schema import Recipe


def first_fault(error: ValidationError, settings: dict[str, Any]) -> str:
    """Return the first fault as one sentence, with the number of the others."""
    faults = [(_place(fault, settings), fault) for fault in error.errors(include_url=False)]
    # A field of several types has a fault for each of them: the deepest fault belongs to the type that was meant.
    around = [found for found in faults if _on_one_way(found[0], faults[0][0])]
    loc, fault = max(around, key=lambda found: len(found[0]))
    place = short(".".join(map(str, loc)))
    if fault["type"] == "extra_forbidden":
        known = _fields_at(loc[:-1])
        said = f"the recipe's field {place!r} is not known{_did_you_mean(str(loc[-1]), known)}"
    elif fault["type"] == "missing":
        said = f"the recipe's field {place!r} is missing: add it ({_fields_help(fault['loc'])})"
    elif fault["type"] == "value_error":
        said = f"the recipe's {place + ': ' if place else ''}{short(str(fault['ctx']['error']), 1000)}"
    else:
        wanted = " or ".join(dict.fromkeys(_wanted(other["msg"]) for found, other in around if found == loc))
        said = f"the recipe's field {place!r} is {short(repr(fault['input']))}: {wanted}"
    more = len(faults) - len(around)
    return said + (f" (and {more} more)" if more else "")


def _place(fault: ErrorDetails, settings: Any) -> tuple[int | str, ...]:
    """Return the path of a fault in the settings, without the names of tried types that pydantic puts among the fields."""
    place: list[int | str] = []
    for part in fault["loc"]:
        if part in settings if isinstance(settings, dict) else isinstance(settings, list) and isinstance(part, int):
            place.append(part)
            settings = settings[part]
    # A missing field is not in the settings, nor is a name that stands for a mapping, such as a transfer's.
    named = fault["type"] in ("missing", "extra_forbidden") and place[-1:] != [fault["loc"][-1]]
    return (*place, fault["loc"][-1]) if named else tuple(place)


def _on_one_way(one: Sequence[object], other: Sequence[object]) -> bool:
    """Return True if one place lies at or inside the other."""
    return all(mine == theirs for mine, theirs in zip(one, other, strict=False))


def _wanted(message: str) -> str:
    """Put pydantic's message into the terms of YAML."""
    said = message[0].lower() + message[1:]
    said = said.replace("tuple", "list").replace("dictionary", "mapping").replace(" after validation", "")
    return re.sub(r" or instance of \w+", "", said)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1)
    if nearest:
        return f": did you mean {nearest[0]!r}?"
    return f": known there are {', '.join(known)}" if known else ""


def _model_at(loc: Sequence[int | str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Recipe
    for part in loc:
        field = model.model_fields.get(str(part)) if model else None
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        # A name in a mapping (evaluate.perplexity.NAME) is no field: stay with the mapping's model.
        model = found[0] if found else model if not field else None
    return model


def _fields_at(loc: Sequence[int | str]) -> list[str]:
    model = _model_at(loc)
    return list(model.model_fields) if model else []


def _fields_help(loc: Sequence[int | str]) -> str:
    model = _model_at(loc[:-1])
    field = model.model_fields.get(str(loc[-1])) if model else None
    return (field.description or "").rstrip(".") if field else "see docs/recipe.md"
