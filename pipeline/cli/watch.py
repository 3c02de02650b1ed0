"""The verb `watch` and the verbs of `schedule`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from components.watch.find import Watched
    from pipeline.kubeflow.client import Kubeflow
    from pipeline.kubeflow.profile import Profile
    from pipeline.runners.watch import Outcome

NOTHING_WRONG, ERROR, FAIL = 0, 1, 3
"""Exit status: nothing new or every candidate held its rules; a source or a run failed; a candidate did not hold them."""

console = Console()

Sources = Annotated[Path | None, typer.Argument(metavar="[SOURCES]", help="A YAML list of sources (docs/watch.md).")]
Source = Annotated[
    list[str] | None, typer.Option(help="A Hub id, s3:// prefix, models:/name@alias or folder; may be repeated.")
]
RecipeName = Annotated[str | None, typer.Option(help="The recipe of every source that names none.")]
Name = Annotated[str | None, typer.Option(help="The registered model's name, for --source.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value for a field, for --source.")
]
AtMost = Annotated[int, typer.Option(min=1, help="How many are recompressed at the same time.")]
Home = Annotated[Path, typer.Option(help="Where all state lies.", envvar="ESPALIER_HOME")]


def watch(
    sources: Sources = None,
    source: Source = None,
    recipe: RecipeName = None,
    name: Name = None,
    set_: Set = None,
    at_most: AtMost = 1,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Minutes between two looks, without --once.")] = 60.0,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try again what failed before or was left claimed (the first look only).")
    ] = False,
    home: Home = Path(".espalier"),
) -> None:
    """Recompress the releases that are new. Exit status 0: nothing is amiss; 3: a candidate failed its rules; 1: an error."""
    watched = _watched(sources, source, recipe, name, set_ or ())
    while True:
        outcomes = _look(watched, at_most, home, retry)
        if once:
            raise typer.Exit(status(outcomes))
        retry = False
        time.sleep(every * 60)


schedule_app = typer.Typer(help="The watcher on a schedule, on Kubeflow.", no_args_is_help=True)

Schedule = Annotated[str, typer.Option("--name", help="The schedule's name.")]
ProfileName = Annotated[str, typer.Option(help="The cluster profile: a file, or a shipped one's name.")]
Image = Annotated[
    str | None,
    typer.Option(help="The stages' image with its digest, in place of the profile's.", envvar="ESPALIER_IMAGE"),
]


@schedule_app.command("create")
def schedule_create(
    sources: Annotated[Path, typer.Argument(help="A YAML list of sources (docs/watch.md).")],
    cron: Annotated[str, typer.Option(help="When: second, minute, hour, day of month, month, day of week.")],
    schedule: Schedule = "espalier-watch",
    recipe: RecipeName = None,
    at_most: AtMost = 2,
    lease_hours: Annotated[float, typer.Option(min=0.1, help="How long a claim on an item is believed.")] = 48.0,
    profile: ProfileName = "plain",
    image: Image = None,
    mutable_image: Annotated[bool, typer.Option("--mutable-image", help="Take an image by a tag.")] = False,
) -> None:
    """Upload the watcher and start it on a schedule. The same again changes nothing; another one takes its place."""
    from pipeline.kubeflow import schedule as schedules
    from pipeline.kubeflow.client import Kubeflow
    from pipeline.kubeflow.profile import Profile

    schedules.check_cron(cron)
    cluster = Profile.load(profile, image)
    cluster.pinned_image(mutable_image)
    watched = _cluster_sources(_watched(sources, None, recipe, None, ()), cluster)
    package = schedules.compile_watch(cluster, at_most, mutable_image)
    plan = schedules.Plan(
        name=schedule,
        cron=cron,
        parameters={"sources": [one.model_dump() for one in watched], "lease_hours": lease_hours},
        service_account=cluster.service_account,
        pipeline_root=cluster.pipeline_root,
    )
    run, made = schedules.create(Kubeflow(cluster.kubeflow), plan, package)
    console.print(f"{schedule}: {'made' if made else 'there already'} ({run.recurring_run_id})", highlight=False)


@schedule_app.command("show")
def schedule_show(schedule: Schedule = "espalier-watch", profile: ProfileName = "plain") -> None:
    """Show the schedule, whether it is paused, and what it watches."""
    from pipeline.kubeflow import schedule as schedules

    run = schedules.find(_connected(profile), schedule)[0]
    state = "paused" if run.mode == "DISABLE" else "enabled"
    console.print(f"{run.display_name}  {run.trigger.cron_schedule.cron}  {state}", highlight=False)
    for source in (run.runtime_config.parameters or {}).get("sources", ()):
        console.print(f"  {source['release']} as {source['name']}", highlight=False, markup=False)


@schedule_app.command("pause")
def schedule_pause(schedule: Schedule = "espalier-watch", profile: ProfileName = "plain") -> None:
    """Start no more runs; the one that is running goes on."""
    from pipeline.kubeflow import schedule as schedules

    schedules.pause(_connected(profile), schedule)
    console.print(f"{schedule}: paused", highlight=False)


@schedule_app.command("resume")
def schedule_resume(schedule: Schedule = "espalier-watch", profile: ProfileName = "plain") -> None:
    """Start runs again."""
    from pipeline.kubeflow import schedule as schedules

    schedules.resume(_connected(profile), schedule)
    console.print(f"{schedule}: enabled", highlight=False)


@schedule_app.command("delete")
def schedule_delete(schedule: Schedule = "espalier-watch", profile: ProfileName = "plain") -> None:
    """Delete the schedule; what it made stays."""
    from pipeline.kubeflow import schedule as schedules

    schedules.delete(_connected(profile), schedule)
    console.print(f"{schedule}: deleted", highlight=False)


def status(outcomes: Sequence[Outcome]) -> int:
    """The exit status. A failure that is only remembered is none: it was told when it happened."""
    if any(outcome.state == "refused" or (outcome.state == "failed" and outcome.tried) for outcome in outcomes):
        return ERROR
    return FAIL if any(outcome.state == "fail" for outcome in outcomes) else NOTHING_WRONG


def _look(watched: Sequence[Watched], at_most: int, home: Path, retry: bool) -> list[Outcome]:
    from pipeline.runners.watch import watch_once

    outcomes = watch_once(watched, at_most, home, console, retry)
    table = Table("release", "name", "", "", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for outcome in outcomes:
        table.add_row(escape(outcome.release), escape(outcome.name), outcome.state, escape(outcome.detail))
    console.print(table)
    return outcomes


def _connected(profile: str) -> Kubeflow:
    from pipeline.kubeflow.client import Kubeflow
    from pipeline.kubeflow.profile import Profile

    return Kubeflow(Profile.load(profile).kubeflow)


def _cluster_sources(watched: Sequence[Watched], profile: Profile) -> list[Watched]:
    """The sources as a cluster can read them: no folder of this machine, and their texts put into the store."""
    from components.lib.errors import Refusal
    from components.lib.recipe.schema import Recipe
    from components.lib.store.store import Store
    from pipeline.kubeflow.profile import variables
    from pipeline.runners.run import in_environment, is_local, texts_to_store

    for one in watched:
        if is_local(one.release):
            raise Refusal(
                f"the source {one.release} is a folder of this machine, which a cluster does not see: "
                "put it on S3, and name its s3:// prefix"
            )
    with in_environment(variables(profile, os.environ)):
        store = Store.from_environment()
        recipes = [texts_to_store(Recipe.from_yaml(one.recipe), store).to_yaml() for one in watched]
    return [one.model_copy(update={"recipe": recipe}) for one, recipe in zip(watched, recipes, strict=True)]


def _watched(
    sources: Path | None, source: Sequence[str] | None, recipe: str | None, name: str | None, overrides: Sequence[str]
) -> list[Watched]:
    from components.lib.errors import Refusal
    from pipeline.cli.main import find_recipe
    from pipeline.cli.sources import load_sources, one_by_one

    if (sources is None) == (not source):
        raise Refusal("the watcher needs its sources: name a list (espalier watch SOURCES.yaml), or --source, not both")
    if sources:
        return load_sources(sources, recipe, find_recipe)
    return one_by_one(source or (), name, recipe, overrides, find_recipe)
