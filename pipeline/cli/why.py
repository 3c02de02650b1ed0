"""The verb `why`: which stages would run, and which part of their keys differs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.cli.options import HOME, Home, Release, connected, console


def why(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or a shipped recipe's name such as trsp.")],
    model: Release,
    name: Annotated[str, typer.Option(help="The registered model's name.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value for a field of the recipe.")
    ] = None,
    home: Home = HOME,
) -> None:
    """Say for each stage whether its output is there, and if not, how its key differs from the newest output."""
    from components.lib.recipe.loading import load_recipe
    from components.lib.store.store import Store
    from pipeline.recipes import find_recipe
    from pipeline.runners.run import check
    from pipeline.runners.why import why as answers

    parsed = load_recipe(find_recipe(recipe), set_ or ())
    check(parsed, model, name)
    with connected(home):
        table = Table("stage", "", "", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for answer in answers(parsed, model, name, Store.from_environment()):
            table.add_row(answer.stage, answer.state, escape("\n".join(answer.reasons)))
    console.print(table)
