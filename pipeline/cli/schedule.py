"""The verbs of `schedule`: the watcher as a recurring run on Kubeflow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from pipeline.cli.options import AtMost, Cluster, Image, Mutable, RecipeName, console
from pipeline.cli.watch import watched_sources

if TYPE_CHECKING:
    from components.watch.find import Watched
    from pipeline.kubeflow.client import KubeflowClient
    from pipeline.kubeflow.profile import Profile

schedule_app = typer.Typer(help="The watcher on a schedule, on Kubeflow.", no_args_is_help=True)

Schedule = Annotated[str, typer.Option("--name", help="The schedule's name.")]


@schedule_app.command("create")
def schedule_create(
    sources: Annotated[Path, typer.Argument(help="A YAML list of sources (docs/watch.md).")],
    cron: Annotated[str, typer.Option(help="When: second, minute, hour, day of month, month, day of week.")],
    schedule: Schedule = "espalier-watch",
    recipe: RecipeName = None,
    at_most: AtMost = 2,
    lease_hours: Annotated[float, typer.Option(min=0.1, help="Hours until a claim on an item expires.")] = 48.0,
    profile: Cluster = "plain",
    image: Image = None,
    mutable_image: Mutable = False,
) -> None:
    """Upload the watcher and start it on a schedule. An equal schedule is kept; a different one of that name is replaced."""
    from pipeline.kubeflow import schedule as schedules
    from pipeline.kubeflow.client import KubeflowClient
    from pipeline.kubeflow.profile import Profile

    schedules.check_cron(cron)
    cluster = Profile.load(profile, image)
    cluster.pinned_image(mutable_image)
    watched = _cluster_sources(watched_sources(sources, None, recipe, None, ()), cluster)
    package = schedules.compile_watch(cluster, at_most, mutable_image)
    plan = schedules.Plan(
        name=schedule,
        cron=cron,
        parameters={"sources": [one.model_dump() for one in watched], "lease_hours": lease_hours},
        service_account=cluster.service_account,
        pipeline_root=cluster.pipeline_root,
    )
    run, made = schedules.create(KubeflowClient(cluster.kubeflow), plan, package)
    console.print(f"{schedule}: {'made' if made else 'there already'} ({run.recurring_run_id})", highlight=False)


@schedule_app.command("show")
def schedule_show(schedule: Schedule = "espalier-watch", profile: Cluster = "plain") -> None:
    """Show the schedule, whether it is paused, and its sources."""
    from pipeline.kubeflow import schedule as schedules

    run = schedules.find(_connected(profile), schedule)[0]
    state = "paused" if run.mode == "DISABLE" else "enabled"
    console.print(f"{run.display_name}  {run.trigger.cron_schedule.cron}  {state}", highlight=False)
    for source in (run.runtime_config.parameters or {}).get("sources", ()):
        console.print(f"  {source['release']} as {source['name']}", highlight=False, markup=False)


@schedule_app.command("pause")
def schedule_pause(schedule: Schedule = "espalier-watch", profile: Cluster = "plain") -> None:
    """Start no more runs; a run in progress continues."""
    from pipeline.kubeflow import schedule as schedules

    schedules.pause(_connected(profile), schedule)
    console.print(f"{schedule}: paused", highlight=False)


@schedule_app.command("resume")
def schedule_resume(schedule: Schedule = "espalier-watch", profile: Cluster = "plain") -> None:
    """Start runs again."""
    from pipeline.kubeflow import schedule as schedules

    schedules.resume(_connected(profile), schedule)
    console.print(f"{schedule}: enabled", highlight=False)


@schedule_app.command("delete")
def schedule_delete(schedule: Schedule = "espalier-watch", profile: Cluster = "plain") -> None:
    """Delete the schedule; the versions that it registered stay."""
    from pipeline.kubeflow import schedule as schedules

    schedules.delete(_connected(profile), schedule)
    console.print(f"{schedule}: deleted", highlight=False)


def _connected(profile: str) -> KubeflowClient:
    from pipeline.kubeflow.client import KubeflowClient
    from pipeline.kubeflow.profile import Profile

    return KubeflowClient(Profile.load(profile).kubeflow)


def _cluster_sources(watched: Sequence[Watched], profile: Profile) -> list[Watched]:
    """Return the sources with their texts in the store. Raises Refusal if a release is a folder of this machine."""
    from components.lib.store.store import Store
    from pipeline.kubeflow.profile import variables
    from pipeline.runners.run import files_to_store, in_environment, is_local

    for one in watched:
        if is_local(one.release):
            raise Refusal(
                f"the source {one.release} is a folder of this machine, which a cluster does not see: "
                "put it on S3, and name its s3:// prefix"
            )
    with in_environment(variables(profile, os.environ)):
        store = Store.from_environment()
        recipes = [files_to_store(parse_recipe(one.recipe), store).to_yaml() for one in watched]
    return [one.model_copy(update={"recipe": recipe}) for one, recipe in zip(watched, recipes, strict=True)]
