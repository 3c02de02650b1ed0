"""The verbs that serve a registered version: `manifest` and `serve`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from components.lib.errors import Refusal
from pipeline.cli.options import HOME, Cluster, Home, console

if TYPE_CHECKING:
    from pipeline.serving.manifest import Form

Address = Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="A version: NAME@champion, or NAME@3.")]


class Kind(StrEnum):
    """A kind of KServe."""

    InferenceService = "InferenceService"
    LLMInferenceService = "LLMInferenceService"


class Format(StrEnum):
    """The program that reads the manifest."""

    kserve = "kserve"
    vllm = "vllm"
    compose = "compose"


def manifest(
    address: Address,
    kind: Annotated[Kind, typer.Option(help="The kind of KServe.")] = Kind.InferenceService,
    format_: Annotated[Format, typer.Option("--format", help="Who reads it.")] = Format.kserve,
    profile: Cluster = "plain",
    uri: Annotated[
        str | None, typer.Option(help="An image of the model, oci://registry/name@sha256:…, instead of S3.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; the terminal when absent.")] = None,
    home: Home = HOME,
) -> None:
    """Write the manifest that serves a registered version. The same version gives the same bytes."""
    from pipeline.kubeflow.profile import Profile
    from pipeline.serving.manifest import manifest as manifest_of

    with _connected(home):
        from components.lib.tracking import registry

        form = cast("Form", kind.value if format_ is Format.kserve else format_.value)
        text = manifest_of(registry.find_version(address), Profile.load(profile), form, uri)
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise Refusal(f"--out {out} cannot be written ({error.strerror}): name another file") from None


def serve(
    address: Address,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Further options of the server.")
    ] = None,
    port: Annotated[int, typer.Option(help="The port on the loopback address.")] = 8000,
    python: Annotated[
        str | None,
        typer.Option(help="The interpreter of the environment that has vLLM.", envvar="ESPALIER_VLLM_PYTHON"),
    ] = None,
    home: Home = HOME,
) -> None:
    """Serve a registered version on loopback, by OpenAI's protocol: with vLLM if it is installed, else transformers."""
    from pipeline.serving.server import fetch, server

    with _connected(home):
        from components.lib.tracking import registry

        version = registry.find_version(address)
        model = fetch(version, home)
    chosen = server(model, port, python, options or ())
    console.print(
        f"{version.name} version {version.version} by {chosen.name}: http://127.0.0.1:{port}/v1/chat/completions",
        highlight=False,
        soft_wrap=True,
    )
    chosen.replace_this_process()


@contextmanager
def _connected(home: Path) -> Iterator[None]:
    """Name the store and MLflow in the environment; start the embedded ones if none is named."""
    from pipeline.runners.run import check_services, in_environment
    from pipeline.services.embedded import services

    check_services()
    with services(home) as environment, in_environment(environment):
        yield
