"""The list of watched sources: a YAML file, parsed into the watcher's arguments.

recipe: trsp.yaml             # of every source that names none
sources:
  - release: owner/model      # a Hub id, an s3:// prefix, models:/name@alias, or a folder
    name: model-small         # the registered model's name
    recipe: other.yaml
    set: [methods.trsp.ratio=0.5]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from components.lib.errors import Refusal
from components.lib.given_yaml import read_yaml, short
from components.lib.recipe.loading import load_recipe
from components.lib.recipe.schema import Section
from components.watch.find import Reason, Watched

FindRecipe = Callable[[str], Path]


class Source(Section):
    """One source of the list."""

    release: str = Field(min_length=1)
    name: str = Field(min_length=1)
    recipe: str | None = None
    set: tuple[str, ...] = ()
    recompress_on: tuple[Reason, ...] | None = None


class SourceList(Section):
    """The whole list."""

    recipe: str | None = None
    recompress_on: tuple[Reason, ...] = ("release",)
    sources: tuple[Source, ...] = Field(min_length=1)


def load_sources(path: Path, recipe: str | None, find: FindRecipe) -> list[Watched]:
    """Read a list of sources and the recipes it names.

    Args:
        path: the list. The paths of recipes are relative to its folder.
        recipe: the recipe of every source that names none, if the list names none either.
        find: turns the name of a recipe into its file.

    Raises:
        Refusal: the list or a recipe cannot be read, or a source has no recipe.
    """
    listed = _parse(path)
    watched = [_watched(source, listed, recipe, path, find) for source in listed.sources]
    for one in watched:
        for other in watched:
            alike = (one.release, one.name) == (other.release, other.name)
            if alike and one.recipe != other.recipe and "recipe" not in one.recompress_on:
                raise Refusal(
                    f"the list of sources {path} names {one.release} twice for {one.name}, with two recipes: give them two names, "
                    "or add recipe to recompress_on"
                )
    return watched


def one_by_one(
    releases: Sequence[str],
    name: str | None,
    recipe: str | None,
    overrides: Sequence[str],
    find: FindRecipe,
    recompress_on: Sequence[Reason] = (),
) -> list[Watched]:
    """Return the sources that the command line names. Raises Refusal if the name or the recipe is missing."""
    if not name or not recipe:
        missing = "--name" if not name else "--recipe"
        raise Refusal(f"--source {releases[0]} has no {missing}: give it, or write a list of sources")
    text = load_recipe(find(recipe), overrides).to_yaml()
    reasons: tuple[Reason, ...] = ("release", *recompress_on)
    return [Watched(release=release, name=name, recipe=text, recompress_on=reasons) for release in releases]


def _watched(source: Source, listed: SourceList, given: str | None, path: Path, find: FindRecipe) -> Watched:
    named = source.recipe or listed.recipe
    if named:
        beside = path.parent / named
        file = beside if beside.exists() else find(named)
    elif given:
        file = find(given)
    else:
        raise Refusal(f"{path}: the source {source.release} has no recipe: add 'recipe' to it, or to the whole list")
    return _checked(
        path,
        release=source.release,
        name=source.name,
        recipe=load_recipe(file, source.set).to_yaml(),
        recompress_on=source.recompress_on or listed.recompress_on,
    )


def _checked(path: Path, **fields: Any) -> Watched:
    try:
        return Watched.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refusal(f"the list of sources {path} is wrong at {first['loc'][0]}: {first['msg']}") from None


def _parse(path: Path) -> SourceList:
    try:
        return SourceList.model_validate(read_yaml(path))
    except OSError as error:
        raise Refusal(f"the list of sources {path} cannot be read ({error.strerror}): name a YAML file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = short(".".join(map(str, first["loc"]))) or "its top level"
        raise Refusal(
            f"the list of sources {path} is wrong at {where} ({first['msg']}): write 'sources', a list of release and name"
        ) from None
    except ValueError as error:
        raise Refusal(f"the list of sources {path} is not YAML ({error}): correct it") from None
