"""Read recipes: from YAML, from a file, with fields overridden."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from components.lib.errors import Refusal
from components.lib.given_yaml import parse_yaml, short
from components.lib.recipe.messages import first_fault
from components.lib.recipe.schema import Recipe
from components.lib.recipe.section import descend

_BEFORE_METHODS = ("method", "target", "gates", "dress")
"""Fields of recipes written before each method had its own settings."""


_BEFORE_RULES = {
    "perplexity_over_dense": ("perplexity", "dense"),
    "perplexity_over_control": ("perplexity", "pruned-first"),
    "perplexity_over_champion": ("perplexity", "champion"),
    "parameters_over_dense": ("parameters", "dense"),
    "prefill_speedup": ("prefill", "dense"),
    "decode_speedup": ("decode", "dense"),
}
"""Fields of `promote` in recipes written before each rule had a name: the figure, and the model it is compared with."""


def parse_recipe(text: str, overrides: Sequence[str] = ()) -> Recipe:
    """Parse a recipe and apply `dotted.key=value` overrides, each value read as YAML; null removes the field.

    Raises:
        Refusal: the YAML cannot be read, a field is unknown or its value is not allowed.
    """
    try:
        settings = parse_yaml(text)
    except ValueError as error:
        raise Refusal(f"the recipe is not YAML: {error}: correct it") from None
    if not isinstance(settings, dict):
        raise Refusal(
            "the recipe is not a mapping of sections: start from one of the shipped recipes (espalier recipes)"
        )
    for override in overrides:
        _override(settings, override)
    _refuse_old_form(settings)
    _refuse_old_rules(settings.get("promote"))
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise Refusal(first_fault(error, settings)) from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file. Raises Refusal if it cannot be read, and what `parse_recipe` raises."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise Refusal(
            f"the recipe {path} cannot be read ({why}): name a YAML file or a shipped recipe (espalier recipes)"
        ) from None
    return parse_recipe(text, overrides)


def _refuse_old_form(settings: dict[str, Any]) -> None:
    """Refuse a recipe of the old form with a sentence that gives the present form."""
    target = settings.get("target")
    # A target is a field of the present form too, without a ratio.
    sized = isinstance(target, dict) and "ratio" in target
    old = [name for name in _BEFORE_METHODS if name in settings and (name != "target" or sized)]
    if not old:
        return
    method = settings.get("method", "trsp")
    names = method if isinstance(method, list) else [method]
    ratio = {"ratio": target["ratio"]} if isinstance(target, dict) and "ratio" in target else {}
    own = {"trsp": "gates", "dress": "dress"}
    methods: dict[str, Any] = {}
    for name in map(str, names):
        section = settings.get(own.get(name, ""))
        given = section if isinstance(section, dict) else {}
        methods[name] = ratio | {field: value for field, value in given.items() if value is not None}
    written = yaml.safe_dump({"methods": methods}, default_flow_style=True, sort_keys=False, width=1000).strip()
    raise Refusal(
        f"the recipe's field {old[0]!r} is of an older form, in which methods shared their settings: "
        f"replace {', '.join(old)} by {written[1:-1]}"
    )


def _refuse_old_rules(promote: Any) -> None:
    """Refuse rules of the old form with a sentence that gives the present form."""
    old = [name for name in promote if name in _BEFORE_RULES] if isinstance(promote, dict) else []
    if not old:
        return
    figure, against = _BEFORE_RULES[old[0]]
    bound = promote[old[0]]
    written = f"{{figure: {figure}, against: {against}, bound: {bound}, why: ...}}"
    cure = "remove it" if bound is None else f"write promote.rules.NAME: {written}"
    raise Refusal(f"the recipe's field 'promote.{old[0]}' is of an older form, in which rules had no names: {cure}")


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise Refusal(f"--set {override!r} has no value: write --set dotted.key=value")
    section, leaf = descend(settings, key.strip())
    try:
        section[leaf] = _yaml_value(value)
    except ValueError:
        raise Refusal(f"--set {key} has the value {short(repr(value))}, which is not YAML: quote it") from None
    if section[leaf] is None:
        del section[leaf]


def _yaml_value(text: str) -> Any:
    """Parse a YAML value. YAML 1.1 reads 1e-4 as a string, which is turned into the number."""
    value = parse_yaml(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
