"""The verbs that bring a registered version to a server: `manifest`, `package`, `deploy` and `serve`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from components.lib.errors import Refusal
from pipeline.cli.options import ERROR, HOME, PASS, Cluster, Home, connected, console, write_or_print

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

    with connected(home):
        from components.lib.tracking import registry

        text = manifest_of(registry.find_version(address), Profile.load(profile), _form(kind, format_), uri)
    write_or_print(text, out)


def package(
    address: Address,
    to: Annotated[str, typer.Option(metavar="oci:FOLDER", help="The new folder of the image.")],
    home: Home = HOME,
) -> None:
    """Write a registered version as an OCI image, without a container engine. The same version gives the same digests."""
    from pipeline.serving.image import package as write
    from pipeline.serving.image import target

    layout = target(to)
    with connected(home):
        from components.lib.tracking import registry

        version = registry.find_version(address)
        digest = write(version, home, layout)
    image = version.name.lower()
    lines = (
        f"{version.name} version {version.version}: {digest} in {layout}",
        f"push it:  skopeo copy --all --preserve-digests {to} docker://REGISTRY/{image}",
        f"serve it: espalier manifest {version.name}@{version.version} --uri oci://REGISTRY/{image}@{digest}",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def deploy(
    address: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="The alias to follow, such as NAME@champion.")],
    out: Annotated[Path | None, typer.Option(help="The file that holds the manifest, such as one in git.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Apply the manifest with kubectl.")] = False,
    kind: Annotated[Kind, typer.Option(help="The kind of KServe.")] = Kind.InferenceService,
    format_: Annotated[Format, typer.Option("--format", help="Who reads the manifest.")] = Format.kserve,
    profile: Cluster = "plain",
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Deploy no version without a signature that holds.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the alias until this is stopped.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the alias, with --watch.")] = 10.0,
    webhook: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT",
            help="Look at once when MLflow's webhook sends an event there, signed with ESPALIER_WEBHOOK_SECRET. Loopback without a host.",
        ),
    ] = None,
    home: Home = HOME,
) -> None:
    """Deploy the version that an alias names, after verifying its files. Prints a condition as one line of JSON for each change."""
    from pipeline.kubeflow.profile import Profile
    from pipeline.serving.reconcile import Condition, Reconciler, Target
    from pipeline.serving.webhook import listening

    if out is None and not apply:
        raise Refusal("deploy has nowhere to put the manifest: name a file (--out), or apply it with kubectl (--apply)")
    if apply and format_ is not Format.kserve:
        raise Refusal(f"--apply is for KServe's kinds, not for {format_.value}: leave it out, and name a file (--out)")
    if webhook is not None and not watch:
        raise Refusal("--webhook wakes a reconciler that follows the alias: add --watch, or leave it out")
    form = _form(kind, format_)

    def say(condition: Condition) -> None:
        print(condition.model_dump_json(exclude_none=True), flush=True)

    with connected(home):
        target = Target(out, apply)
        reconciler = Reconciler(address, Profile.load(profile), form, target, require_signature=require_signature)
        if watch:
            with listening(webhook, reconciler.name, reconciler.alias) as wait:
                reconciler.follow(every, say, wait)
        found = reconciler.look()
    say(found)
    raise typer.Exit(PASS if found.status == "True" else ERROR)


def serve(
    address: Address,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Further options of the server.")
    ] = None,
    port: Annotated[int, typer.Option(help="The port on the loopback address.")] = 8000,
    python: Annotated[
        str | None,
        typer.Option(help="The interpreter of an environment that has vLLM; that of ESPALIER_VLLM_PYTHON if absent."),
    ] = None,
    home: Home = HOME,
) -> None:
    """Serve a registered version on loopback, by OpenAI's protocol: with vLLM if it is installed, else transformers."""
    from pipeline.serving.server import fetch, server

    with connected(home):
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


def _form(kind: Kind, format_: Format) -> Form:
    return cast("Form", kind.value if format_ is Format.kserve else format_.value)
