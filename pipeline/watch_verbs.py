"""The verb `watch` and the verbs of `schedule`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from components.watch.find import Watched
    from pipeline.watch_local import Outcome

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
Host = Annotated[
    str | None,
    typer.Option(help="Kubeflow's address; found in the cluster or the kubeconfig when absent.", envvar="KFP_HOST"),
]
Namespace = Annotated[str, typer.Option(help="The namespace that runs start in.", envvar="KFP_NAMESPACE")]


@schedule_app.command("create")
def schedule_create(
    sources: Annotated[Path, typer.Argument(help="A YAML list of sources (docs/watch.md).")],
    cron: Annotated[str, typer.Option(help="When: second, minute, hour, day of month, month, day of week.")],
    schedule: Schedule = "espalier-watch",
    recipe: RecipeName = None,
    at_most: AtMost = 2,
    lease_hours: Annotated[float, typer.Option(min=0.1, help="How long a claim on an item is believed.")] = 48.0,
    profile: Annotated[str | None, typer.Option(help="The cluster profile (docs/cluster.md).")] = None,
    host: Host = None,
    namespace: Namespace = "kubeflow",
) -> None:
    """Upload the watcher and start it on a schedule. The same again changes nothing; another one takes its place."""
    from pipeline import schedule as schedules

    schedules.check_cron(cron)
    watched = _cluster_sources(sources, recipe)
    with schedules.compiled(at_most, profile) as (package, service_account):
        parameters = {"sources": [one.model_dump() for one in watched], "lease_hours": lease_hours}
        plan = schedules.Plan(schedule, cron, parameters, service_account)
        run, made = schedules.create(schedules.connect(host, namespace), plan, package)
    console.print(f"{schedule}: {'made' if made else 'there already'} ({run.recurring_run_id})", highlight=False)


@schedule_app.command("show")
def schedule_show(schedule: Schedule = "espalier-watch", host: Host = None, namespace: Namespace = "kubeflow") -> None:
    """Show the schedule, what it watches, and whether it is paused."""
    from pipeline import schedule as schedules

    run = schedules.find(schedules.connect(host, namespace), schedule)
    parameters = run.runtime_config.parameters or {}
    console.print(f"{run.display_name}  {run.trigger.cron_schedule.cron}  {_mode(run)}", highlight=False)
    for source in parameters.get("sources", ()):
        console.print(f"  {source['release']} as {source['name']}", highlight=False, markup=False)


@schedule_app.command("pause")
def schedule_pause(schedule: Schedule = "espalier-watch", host: Host = None, namespace: Namespace = "kubeflow") -> None:
    """Start no more runs; the one that is running goes on."""
    from pipeline import schedule as schedules

    schedules.pause(schedules.connect(host, namespace), schedule)
    console.print(f"{schedule}: paused", highlight=False)


@schedule_app.command("resume")
def schedule_resume(
    schedule: Schedule = "espalier-watch", host: Host = None, namespace: Namespace = "kubeflow"
) -> None:
    """Start runs again."""
    from pipeline import schedule as schedules

    schedules.resume(schedules.connect(host, namespace), schedule)
    console.print(f"{schedule}: enabled", highlight=False)


@schedule_app.command("delete")
def schedule_delete(
    schedule: Schedule = "espalier-watch", host: Host = None, namespace: Namespace = "kubeflow"
) -> None:
    """Delete the schedule; what it made stays."""
    from pipeline import schedule as schedules

    schedules.delete(schedules.connect(host, namespace), schedule)
    console.print(f"{schedule}: deleted", highlight=False)


def status(outcomes: Sequence[Outcome]) -> int:
    """The exit status. A failure that is only remembered is none: it was told when it happened."""
    if any(outcome.state == "refused" or (outcome.state == "failed" and outcome.tried) for outcome in outcomes):
        return ERROR
    return FAIL if any(outcome.state == "fail" for outcome in outcomes) else NOTHING_WRONG


def _look(watched: Sequence[Watched], at_most: int, home: Path, retry: bool) -> list[Outcome]:
    from pipeline.watch_local import watch_once

    outcomes = watch_once(watched, at_most, home, console, retry)
    table = Table("release", "name", "", "", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for outcome in outcomes:
        table.add_row(escape(outcome.release), escape(outcome.name), outcome.state, escape(outcome.detail))
    console.print(table)
    return outcomes


def _mode(run: Any) -> str:
    return "paused" if run.status == "DISABLED" or run.mode == "DISABLE" else "enabled"


def _cluster_sources(path: Path, recipe: str | None) -> list[Watched]:
    """The sources as a cluster can read them: no folder of this machine, and its texts put into the store."""
    from components.errors import Refusal
    from components.recipe import Recipe
    from components.store import Store
    from pipeline.run import is_local, texts_to_store

    watched = _watched(path, None, recipe, None, ())
    for one in watched:
        if is_local(one.release):
            raise Refusal(
                f"{path}: the source {one.release} is a folder of this machine, which a cluster does not see: "
                "put it on S3, and name its s3:// prefix"
            )
    store: Store | None = None
    ready = []
    for one in watched:
        parsed = Recipe.from_yaml(one.recipe)
        if any(text.path and not text.path.startswith("s3://") for _, text in parsed.texts()):
            store = store or Store.from_environment()
            parsed = texts_to_store(parsed, store)
        ready.append(one.model_copy(update={"recipe": parsed.to_yaml()}))
    return ready


def _watched(
    sources: Path | None, source: Sequence[str] | None, recipe: str | None, name: str | None, overrides: Sequence[str]
) -> list[Watched]:
    from components.errors import Refusal
    from pipeline.cli import find_recipe
    from pipeline.sources import load_sources, one_by_one

    if (sources is None) == (not source):
        raise Refusal("the watcher needs its sources: name a list (espalier watch SOURCES.yaml), or --source, not both")
    if sources:
        return load_sources(sources, recipe, find_recipe)
    return one_by_one(source or (), name, recipe, overrides, find_recipe)
