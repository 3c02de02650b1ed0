"""The shipped recipes are whole, and say what they ship."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import pipeline
from components.recipe import Recipe, Text, methods

RECIPES = sorted((Path(pipeline.__file__).parent / "recipes").glob("*.yaml"))
BASELINES = [path for path in RECIPES if path.stem in ("sleb", "shortgpt")]


def settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def leaves(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no section, by its dotted name, with its default (`...` where it has none)."""
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation is not Text:
            yield from leaves(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ... if field.is_required() else field.default


def value(settings: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        settings = settings[part]
    return settings


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_named_after_its_method(path: Path) -> None:
    assert Recipe.load(path).method == path.stem


def test_every_method_ships_a_recipe() -> None:
    assert {path.stem for path in RECIPES} >= set(methods())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_line_says_what_the_recipe_is(path: Path) -> None:
    """`espalier recipes` prints it."""
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_trsp_names_every_field() -> None:
    shipped = settings(next(path for path in RECIPES if path.stem == "trsp"))
    for name, _ in leaves(Recipe):
        value(shipped, name)


def test_trsp_ships_the_defaults() -> None:
    """The recipe shows what a field left out would be; only the rules of the verdict have no default to show."""
    shipped = settings(next(path for path in RECIPES if path.stem == "trsp"))
    expected = {
        name: default for name, default in leaves(Recipe) if default is not ... and name.split(".")[0] != "promote"
    }
    found = {name: value(shipped, name) for name in expected}
    assert {name: tuple(seen) if isinstance(seen, list) else seen for name, seen in found.items()} == expected


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_regularises_nothing_and_learns_no_gates(path: Path) -> None:
    assert Recipe.load(path).regularize.schedule == "none"
    assert "gates" not in settings(path)


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
@pytest.mark.parametrize("section", ["target", "calibration", "recover", "evaluate", "promote"])
def test_a_baseline_names_every_field_of_the_sections_it_uses(path: Path, section: str) -> None:
    shipped = settings(path)
    for name, _ in leaves(Recipe):
        if name.startswith(f"{section}."):
            value(shipped, name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_quality_is_reported_on_another_domain_too(path: Path) -> None:
    recipe = Recipe.load(path)
    assert any(text.hub != recipe.calibration.data.hub for text in recipe.evaluate.perplexity.values())


def test_the_verdicts_of_the_shipped_recipes_compare() -> None:
    """One set of rules and one set of texts, or the methods could not be told apart by their verdicts."""
    assert len({(repr(recipe.promote), repr(recipe.evaluate)) for recipe in map(Recipe.load, RECIPES)}) == 1
