"""The cells of a comparison: every recipe with every ratio and every seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from components.lib.errors import Refusal
from components.lib.recipe.loading import load_recipe, parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.recipe.section import Section
from pipeline.recipes import find_recipe


@dataclass(frozen=True)
class Cell:
    """One recipe with one ratio and one seed."""

    name: str
    """The recipe's name."""
    ratio: float | None
    """Of every method; None for the recipe's own."""
    seed: int | None
    """Of everything that is drawn; None for the recipe's own."""
    recipe: Recipe


def cells(recipes: Mapping[str, Recipe], ratios: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Return every recipe with every ratio and every seed; the first seed of each recipe and ratio comes first.

    Args:
        recipes: by name.
        ratios: set as the ratio of every method that a recipe names; empty keeps the recipes' own.
        seeds: set as every `seed` of a recipe, the calibration's included; empty keeps the recipes' own.

    Raises:
        Refusal: a recipe has no ratio to set, or does not allow the value.
    """
    return [
        Cell(name, ratio, seed, _with(name, recipe, ratio, seed))
        for seed in dict.fromkeys(seeds) or [None]
        for ratio in dict.fromkeys(ratios) or [None]
        for name, recipe in recipes.items()
    ]


def load_recipes(names: Sequence[str], overrides: Sequence[str]) -> dict[str, Recipe]:
    """Read the recipes by name, with the overrides; one below `methods` applies to the recipes that name its method.

    Raises:
        Refusal: a recipe cannot be read or is wrong, two have one name, no recipe names the method of an override, or the
            recipes do not measure the same.
    """
    recipes: dict[str, Recipe] = {}
    used: set[str] = set()
    for path in map(find_recipe, names):
        if path.stem in recipes:
            raise Refusal(f"two recipes are called {path.stem}: rename the file of one of them")
        own = load_recipe(path, [one for one in overrides if not _method_of(one)])
        named = {method.name for method in own.methods.chosen}
        fitting = [one for one in overrides if _method_of(one) in {"", *named}]
        used |= set(fitting)
        recipes[path.stem] = load_recipe(path, fitting)
    for override in overrides:
        if override not in used:
            raise Refusal(f"--set {override}: no recipe of the comparison names the method {_method_of(override)}")
    _check_comparable(recipes)
    return recipes


def _method_of(override: str) -> str:
    """Return the method whose field an override sets; empty for any other field."""
    section, *rest = override.partition("=")[0].strip().split(".")
    return rest[0] if section == "methods" and rest else ""


def _check_comparable(recipes: Mapping[str, Recipe]) -> None:
    """Raise Refusal unless all recipes measure the same; controls may differ."""
    (first, one), *others = ((name, recipe.evaluate.model_dump(mode="json")) for name, recipe in recipes.items())
    for name, other in others:
        for field in set(one) - {"controls"}:
            if one[field] != other[field]:
                raise Refusal(
                    f"the recipes {first} and {name} have different values of evaluate.{field}, so that their numbers do not "
                    f"compare: give both the same with --set evaluate.{field}=…"
                )


def _with(name: str, recipe: Recipe, ratio: float | None, seed: int | None) -> Recipe:
    overrides = []
    if ratio is not None:
        sized = [method.name for method in recipe.methods.chosen if "ratio" in type(method).model_fields]
        if not sized:
            methods = ", ".join(method.name for method in recipe.methods.chosen)
            raise Refusal(f"the recipe {name} has no ratio to set (its methods: {methods}): leave out --ratios")
        overrides += [f"methods.{method}.ratio={ratio!r}" for method in sized]
    if seed is not None:
        overrides += [f"{section}.seed={seed}" for section in _seeded(recipe)]
    return parse_recipe(recipe.to_yaml(), overrides)


def _seeded(section: Section, place: str = "") -> Iterator[str]:
    """Yield the dotted name of every section that has a seed."""
    for name, value in section:
        if isinstance(value, Section):
            inner = f"{place}.{name}".lstrip(".")
            if "seed" in type(value).model_fields:
                yield inner
            yield from _seeded(value, inner)
