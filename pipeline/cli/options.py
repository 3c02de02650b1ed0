"""Options, exit statuses and the console that several verbs of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

PASS, ERROR, FAIL = 0, 1, 3
"""Exit status: every candidate passed its rules (or there was nothing to do); an error; a candidate failed its rules."""

HOME = Path(".espalier")

console = Console()

Home = Annotated[Path, typer.Option(help="The folder that holds all state.", envvar="ESPALIER_HOME")]
Image = Annotated[
    str | None, typer.Option(help="The stages' image; for a cluster with its digest.", envvar="ESPALIER_IMAGE")
]
Cluster = Annotated[
    str, typer.Option("--profile", help="A cluster profile's file, or a shipped one's name: plain, nvidia, aws-irsa.")
]
Mutable = Annotated[
    bool, typer.Option("--mutable-image", help="Allow an image that is named by a tag, which may change.")
]
RecipeName = Annotated[str | None, typer.Option(help="The recipe of every source that names none.")]
AtMost = Annotated[int, typer.Option(min=1, help="How many releases are recompressed at the same time.")]
