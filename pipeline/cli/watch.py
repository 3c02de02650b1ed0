"""The verb `watch`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from components.lib.errors import Refusal
from pipeline.cli.options import ERROR, FAIL, HOME, PASS, AtMost, Home, RecipeName, console
from pipeline.recipes import find_recipe

if TYPE_CHECKING:
    from components.watch.find import Watched
    from pipeline.runners.watch import Outcome


class AlsoNew(StrEnum):
    """A reason to recompress a source beside another release."""

    recipe = "recipe"
    code = "code"


Sources = Annotated[Path | None, typer.Argument(metavar="[SOURCES]", help="A YAML list of sources (docs/watch.md).")]
Source = Annotated[
    list[str] | None, typer.Option(help="A Hub id, s3:// prefix, models:/name@alias or folder; may be repeated.")
]
Name = Annotated[str | None, typer.Option(help="The registered model's name, for --source.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value for a field, for --source.")
]


def watch(
    sources: Sources = None,
    source: Source = None,
    recipe: RecipeName = None,
    name: Name = None,
    set_: Set = None,
    recompress_on: Annotated[
        list[AlsoNew] | None,
        typer.Option(help="What makes a --source new beside its release: recipe or code; may be repeated."),
    ] = None,
    at_most: AtMost = 1,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Minutes between two looks, without --once.")] = 60.0,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try again what failed before or was left claimed (the first look only).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look once and say what would be recompressed and why; start nothing.")
    ] = False,
    home: Home = HOME,
) -> None:
    """Recompress the releases that are new. Exit status 0: no failure; 3: a candidate failed its rules; 1: an error."""
    watched = watched_sources(sources, source, recipe, name, set_ or (), recompress_on or ())
    if dry_run:
        from pipeline.runners.watch import look_once

        outcomes = look_once(watched, home)
        _show(outcomes)
        raise typer.Exit(status(outcomes))
    while True:
        outcomes = _look(watched, at_most, home, retry)
        if once:
            raise typer.Exit(status(outcomes))
        retry = False
        time.sleep(every * 60)


def status(outcomes: Sequence[Outcome]) -> int:
    """Return the exit status. A failure of an earlier watch does not count: it was reported then."""
    if any(outcome.state == "refused" or (outcome.state == "failed" and outcome.tried) for outcome in outcomes):
        return ERROR
    return FAIL if any(outcome.state == "fail" for outcome in outcomes) else PASS


def _look(watched: Sequence[Watched], at_most: int, home: Path, retry: bool) -> list[Outcome]:
    from pipeline.runners.watch import watch_once

    outcomes = watch_once(watched, at_most, home, console, retry)
    _show(outcomes)
    return outcomes


def _show(outcomes: Sequence[Outcome]) -> None:
    table = Table("release", "name", "", "", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for outcome in outcomes:
        table.add_row(escape(outcome.release), escape(outcome.name), outcome.state, escape(outcome.detail))
    console.print(table)


def watched_sources(
    sources: Path | None,
    source: Sequence[str] | None,
    recipe: str | None,
    name: str | None,
    overrides: Sequence[str],
    recompress_on: Sequence[AlsoNew] = (),
) -> list[Watched]:
    """Return the sources of the list, or those given one by one. Raises Refusal unless exactly one of the two is given."""
    from pipeline.cli.sources import load_sources, one_by_one

    if (sources is None) == (not source):
        raise Refusal("the watcher needs its sources: name a list (espalier watch SOURCES.yaml), or --source, not both")
    if sources:
        if recompress_on:
            raise Refusal("--recompress-on is for --source: write recompress_on into the list of sources")
        return load_sources(sources, recipe, find_recipe)
    return one_by_one(source or (), name, recipe, overrides, find_recipe, [one.value for one in recompress_on])
