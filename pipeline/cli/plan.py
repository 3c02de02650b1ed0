"""The verb `plan`: what each stage of a run needs, before it runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer
from rich.table import Table

from pipeline.cli.options import HOME, Home, Release, connected, console


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or a shipped recipe's name such as trsp.")],
    model: Release,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value for a field of the recipe.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="A cluster profile's file, or a shipped one's name; this machine when absent."),
    ] = None,
    home: Home = HOME,
) -> None:
    """Tell the memory, the disk and the bytes moved of each stage. Nothing but the release's config is read."""
    from components.lib.recipe.loading import load_recipe
    from pipeline.kubeflow.profile import Profile
    from pipeline.plan.plan import device_of, here, shape_of
    from pipeline.recipes import find_recipe

    parsed = load_recipe(find_recipe(recipe), set_ or ())
    cluster = Profile.load(profile) if profile else None
    with connected(home) if model.startswith(("s3://", "models:/")) else nullcontext():
        shape = shape_of(model)
    from pipeline.plan.stages import needs  # imports torch: after the refusals

    machine = None if cluster else here()
    kind = (machine or device_of(cluster, "regularize")).kind  # type: ignore[arg-type]
    table = Table(
        "stage", "memory", "of which", "device", "disk", "moved", box=None, header_style="bold", pad_edge=False
    )
    for need in needs(parsed, shape, kind):  # type: ignore[arg-type]
        device = machine or device_of(cluster, need.stage)  # type: ignore[arg-type]
        takes = device.takes(need)
        parts = need.peak.parts() | {"waiting states": need.held}
        shown = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size > 0.01 * max(takes, 1))
        if (devices := device.shared_by(need)) > 1:
            shown += f"; divided among {devices}"
        small = device.size is not None and takes > device.size
        size = "?" if device.size is None else _gb(device.size)
        fits = f"[red]{size}, too small[/red]" if small else size
        table.add_row(need.stage, _gb(takes), shown, fits if takes else "", _gb(need.scratch), _gb(need.moved))
    console.print(table)
    console.print(
        "GB. Memory is that of tensors on one device; a process takes about 1 GB beside it. "
        "No time is told: no step was measured on that device.",
        highlight=False,
        soft_wrap=True,
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}" if size >= 5e6 else "0"
