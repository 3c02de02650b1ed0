"""Options, exit statuses, the console and a few steps that several verbs of the command line share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from components.lib.errors import Refusal

if TYPE_CHECKING:
    from pipeline.runners.runner import Runner

PASS, ERROR, FAIL = 0, 1, 3
"""Exit status: every candidate passed its rules (or there was nothing to do); an error; a candidate failed its rules."""

HOME = Path(".espalier")

console = Console()

Release = Annotated[
    str,
    typer.Option(
        help="A folder, a GGUF file, an s3:// prefix, a Hub id with an optional @revision, or models:/name@alias."
    ),
]
Place = Annotated[
    Literal["local", "docker", "kubeflow"],
    typer.Option(help="Where the stages run: processes here, containers here, or a cluster."),
]
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


def runner_on(
    on: str, image: str | None = None, profile: str = "plain", mutable: bool = False, parallel: int | None = None
) -> Runner:
    """Return the runner of a place, with the options that count there.

    Raises:
        Refusal: the profile is wrong, or `parallel` is given for a place that runs one cell after the other.
    """
    if parallel and on != "kubeflow":
        raise Refusal(
            f"--parallel is for --on kubeflow: with --on {on} the cells run one after the other, so that they do not disturb "
            "each other's speed"
        )
    if on == "kubeflow":
        from pipeline.compare.pipeline import AT_MOST
        from pipeline.kubeflow.profile import Profile
        from pipeline.runners.kubeflow import KubeflowRunner

        return KubeflowRunner(Profile.load(profile, image), mutable, parallel=parallel or AT_MOST)
    if on == "docker":
        from pipeline.runners.docker import IMAGE, DockerRunner

        return DockerRunner(image or IMAGE)
    from pipeline.runners.local import LocalRunner

    return LocalRunner()


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
