"""The smallest recipe, changed field by field."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe

SMALLEST = {
    "methods": {"trsp": {"ratio": 0.25}},
    "calibration": {"data": "train.txt"},
    "evaluate": {"perplexity": {"test": "test.txt"}},
}
REFERENCE = f"s3://bucket/texts/{'0' * 64}@sha256:{'a' * 64}"


def settings(**changed: Any) -> dict[str, Any]:
    """The smallest recipe, with the values at these dotted names (`__` for the dot) put in; None takes a field away."""
    made: dict[str, Any] = copy.deepcopy(SMALLEST)
    for dotted, value in changed.items():
        *path, leaf = dotted.split("__")
        section = made
        for part in path:
            section = section.setdefault(part, {})
        section[leaf] = value
        if value is None:
            del section[leaf]
    return made


def recipe(*overrides: str, **changed: Any) -> Recipe:
    """The smallest recipe with its changes, as it is parsed from YAML."""
    return parse_recipe(yaml.safe_dump(settings(**changed), sort_keys=False), overrides)


def refusal(*overrides: str, **changed: Any) -> str:
    """The sentence that the changed recipe is refused with."""
    with pytest.raises(Refusal) as refused:
        recipe(*overrides, **changed)
    return str(refused.value)
