"""The verb `compare`: recipes × ratios × seeds on one release."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.markup import escape
from rich.table import Table

from components.lib.errors import Refusal
from components.register.format import ABSENT, times
from pipeline.cli.options import ERROR, HOME, PASS, Cluster, Home, Image, Mutable, Place, Release, console, runner_on

if TYPE_CHECKING:
    from pipeline.compare.comparison import Comparison, Row

T = TypeVar("T")


def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipes' files, or shipped recipes' names such as trsp.")],
    model: Release,
    ratios: Annotated[
        str, typer.Option(help="The ratio of every method, such as 0.1,0.25,0.5; each recipe's own when absent.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Every seed, such as 0,1,2; each recipe's own when absent.")] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Another value for a field; methods.NAME.… applies to the recipes that name this method.",
        ),
    ] = None,
    on: Place = "local",
    image: Image = None,
    profile: Cluster = "plain",
    mutable_image: Mutable = False,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="How many cells run side by side on a cluster; 2 when absent.")
    ] = None,
    home: Home = HOME,
) -> None:
    """Compare recipes over ratios and seeds, and register nothing. Exit status 0: every cell was measured; 1: one failed."""
    from pipeline.compare.cells import load_recipes
    from pipeline.runners.compare import compare as run_cells

    loaded = load_recipes(recipes, set_ or ())
    parts = _numbers("--ratios", ratios, float), _numbers("--seeds", seeds, int)
    runner = runner_on(on, image, profile, mutable_image, parallel)
    place = {"--on": on, "--profile": profile if on == "kubeflow" else "", "--parallel": str(parallel or "")}
    command = _command(recipes, model, ratios, seeds, set_ or (), place if on != "local" else {})
    compared = run_cells(loaded, model, *parts, home, console, command, runner)
    _show(compared.comparison)
    for suffix in ("html", "csv", "json"):
        print(compared.folder / f"comparison.{suffix}")
    raise typer.Exit(ERROR if compared.comparison.failed else PASS)


def _numbers(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(part) for part in text.split(",") if text]
    except ValueError:
        name = "whole numbers" if kind is int else "numbers"
        raise Refusal(f"{option} is {text!r}: write {name} with commas between them, such as {option} 0,1") from None


def _command(
    recipes: Sequence[str], model: str, ratios: str, seeds: str, overrides: Sequence[str], place: Mapping[str, str]
) -> str:
    words = ["espalier", "compare", *recipes, "--model", model]
    words += ["--ratios", ratios] if ratios else []
    words += ["--seeds", seeds] if seeds else []
    words += [word for override in overrides for word in ("--set", override)]
    return shlex.join([*words, *(word for option, value in place.items() if value for word in (option, value))])


def _show(comparison: Comparison) -> None:
    """Print the medians relative to the dense model, whose row has the numbers themselves, and every failed cell."""
    from pipeline.compare.comparison import CANDIDATE
    from pipeline.compare.page import costs, qualities

    axes = [*costs(comparison.metrics), *qualities(comparison.metrics)] if comparison.metrics else []
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for head in ("seeds", *(axis.metric.replace("bytes", "size") for axis in axes)):
        table.add_column(escape(head), justify="right")
    for row in comparison.rows:
        name = row.name if row.model == CANDIDATE or not row.recipe else f"{row.name} {row.model}"
        seeds = f"{row.done}" if row.done == row.cells else f"{row.done} of {row.cells}"
        table.add_row(escape(name), seeds, *(_cell(row, axis.metric) for axis in axes))
    console.print(table)
    for cell in comparison.failed:
        console.print(f"{cell.name} failed: {cell.reason}", highlight=False, markup=False)


def _cell(row: Row, metric: str) -> str:
    from pipeline.compare.page import shown

    if not row.recipe and metric in row.values:
        return shown(metric, row.values[metric].median)
    return times(row.over_dense[metric].median) if metric in row.over_dense else ABSENT
