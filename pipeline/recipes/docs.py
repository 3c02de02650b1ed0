"""Write docs/recipe.md from the recipe's types, so that it cannot drift from them.

python -m pipeline.recipes.docs
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from components.lib.methods import known_methods
from components.lib.recipe.schema import Recipe, Text
from components.lib.transfers import known_transfers

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"

INTRODUCTION = """\
# The recipe

*Written by `python -m pipeline.recipes.docs` from the types in `components/lib/recipe`, `components/lib/methods` and
`components/lib/transfers`: change them, not this page.*

A recipe is one YAML file. It says how a release is recompressed; which release, and under which name the result is registered,
are arguments of the run. The whole recipe is checked before anything starts, and unknown fields are refused. `espalier recipes`
lists the shipped ones; [trsp.yaml](../pipeline/recipes/trsp.yaml), for layers, and [dress.yaml](../pipeline/recipes/dress.yaml), for channels,
name every field and say when to change it. On the command line `--set regularize.steps=200` gives a field another value, read as YAML:
a list is written `--set 'methods.dress.axes=[ffn, hidden]'`, a mapping `--set 'methods.dress.ratio={{ffn: 0.5, hidden: 0.25}}'`; `null`
removes a field, so that `--set methods.trsp=null --set methods.sleb.ratio=0.25` replaces one method by another.

Methods: {methods}. One of layers and one of channels may be named together: layers are chosen first. Transfers: {transfers}.
"""

SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}

SHOWN_AT = {"target.transfer": "regularize.transfer"}
"""Sections that have their table at another place."""

Place = tuple[str, type[BaseModel]]
"""A section's dotted name, and its type."""


def page() -> str:
    """Return docs/recipe.md: a table for each section, in the order of the recipe."""
    introduction = INTRODUCTION.format(
        methods=", ".join(f"`{name}`" for name in known_methods()),
        transfers=", ".join(f"`{name}`" for name in known_transfers()) or "none yet",
    )
    return "\n".join([introduction, *(_section(name, kind) for name, kind in sections())])


def sections() -> Iterator[Place]:
    """Yield every section by its dotted name, each before those inside it; the type shared by several places comes last."""
    yield "", Recipe
    yield from _inside("", Recipe)
    yield "text", Text


def _inside(name: str, kind: type[BaseModel]) -> Iterator[Place]:
    for field, info in kind.model_fields.items():
        inner = _model(info.annotation)
        if inner is not None and inner is not Text:
            place = _place(name, field, info)
            if place not in SHOWN_AT:
                yield place, inner
                yield from _inside(place, inner)


def _place(section: str, field: str, info: FieldInfo) -> str:
    """Return the dotted name of a section; one of several in a mapping is called NAME."""
    named = ".NAME" if get_origin(info.annotation) is dict else ""
    return f"{section}.{field}{named}".lstrip(".")


def _model(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, alone or in a mapping, or None."""
    several = NoneType in get_args(annotation) or get_origin(annotation) is dict
    kinds = (annotation, *get_args(annotation)) if several else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _section(name: str, kind: type[BaseModel]) -> str:
    rows = (f"| {' | '.join(_row(name, field, info))} |" for field, info in kind.model_fields.items())
    title = {"": "Sections", "text": "A text"}.get(name, f"`{name}`")
    head = [
        f"## {title}",
        "",
        _oneline(kind.__doc__ or ""),
        "",
        "| field | type | default | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


def _row(section: str, field: str, info: FieldInfo) -> tuple[str, str, str, str]:
    inner = _model(info.annotation)
    if inner is not None and inner is not Text:
        place = _place(section, field, info)
        kind, default = f"[section](#{_anchor(SHOWN_AT.get(place, place))})", _presence(info)
        if get_origin(info.annotation) is dict:
            kind, default = f"mapping of name to {kind}", "none"
    else:
        kind, default = type_name(info.rebuild_annotation()), _default(info)
    return f"`{field}`", _cell(kind), _cell(default), _cell(_oneline(info.description or ""))


def _presence(info: FieldInfo) -> str:
    """Return whether a section is required, filled in with defaults, or absent by default."""
    if info.is_required():
        return "*required*"
    return "none" if info.default is None else "see there"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "*required*"
    if info.default is None:
        return "none"
    value = list(info.default) if isinstance(info.default, tuple) else info.default
    return f"`{json.dumps(value).strip(chr(34))}`"


def type_name(annotation: Any) -> str:
    """Describe a type as a user writes it in YAML: `int ≥ 1`, `"a" or "b"`, `list of int ≥ 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_name(kind) for kind in arguments if kind is not NoneType)
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        keys = type_name(arguments[0]).replace("string", "name")
        return f"mapping of {keys} to {type_name(arguments[1])}"
    if annotation is Text:
        return "[text](#a-text)"
    return {str: "string", bool: "true or false", float: "number", int: "integer"}[annotation]


def _bounds(metadata: tuple[Any, ...]) -> str:
    """Format a number's limits, which pydantic keeps as objects with an attribute `gt`, `ge`, `lt` or `le`."""
    limits = [limit for part in metadata for limit in (part.metadata if isinstance(part, FieldInfo) else [part])]
    said = [
        f"{sign} {getattr(limit, name)}" for limit in limits for name, sign in SIGNS.items() if hasattr(limit, name)
    ]
    return f" {', '.join(said)}" if said else ""


def _anchor(place: str) -> str:
    """Return GitHub's anchor for the heading of a section."""
    return place.replace(".", "").lower()


def _oneline(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
