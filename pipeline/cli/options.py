"""Options, exit statuses, the console and a few steps that several verbs of the command line share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from components.lib.errors import Refusal

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


@contextmanager
def connected(home: Path) -> Iterator[None]:
    """Name the store and MLflow in the environment for the block; embedded ones are started if it names none."""
    from pipeline.runners.run import check_services, in_environment
    from pipeline.services.embedded import services

    check_services()
    with services(home) as environment, in_environment(environment):
        yield


def write_or_print(text: str, out: Path | None) -> None:
    """Write a text into the file `--out`, or print it if there is none. Raises Refusal if the file cannot be written."""
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise Refusal(f"--out {out} cannot be written ({error.strerror}): name another file") from None
