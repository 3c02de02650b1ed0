"""The command line: one verb, one function."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from components.lib.errors import Refusal, StageFailed, of_machine
from components.lib.recipe.loading import load_recipe
from components.lib.recipe.schema import Recipe
from pipeline.cli.compare import compare
from pipeline.cli.gc import gc
from pipeline.cli.models import diff, models, promote, rollback
from pipeline.cli.options import (
    ERROR,
    FAIL,
    HOME,
    PASS,
    Cluster,
    Home,
    Image,
    Mutable,
    Place,
    Release,
    console,
    runner_on,
    write_or_print,
)
from pipeline.cli.plan import plan
from pipeline.cli.schedule import schedule_app
from pipeline.cli.serving import deploy, manifest, package, serve
from pipeline.cli.watch import watch
from pipeline.cli.why import why
from pipeline.recipes import RECIPES, find_recipe

if TYPE_CHECKING:
    from pipeline.runners.runner import Runner

# Keep the frameworks quiet; some of them would otherwise ask the network for a newer version.
for _name, _value in {
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "1",
}.items():
    os.environ.setdefault(_name, _value)

app = typer.Typer(
    help="Recompress large language models: regularise, then prune, measured and registered.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
services_app = typer.Typer(help="The embedded S3 server and MLflow.", no_args_is_help=True)
app.add_typer(services_app, name="services")
app.add_typer(schedule_app, name="schedule")
app.command()(compare)
app.command()(watch)
app.command()(plan)
app.command()(why)
app.command()(models)
app.command()(diff)
app.command()(promote)
app.command()(rollback)
app.command()(manifest)
app.command()(package)
app.command()(deploy)
app.command()(serve)
app.command()(gc)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or a shipped recipe's name such as trsp.")],
    model: Release,
    name: Annotated[str, typer.Option(help="The registered model's name.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value for a field, such as methods.trsp.ratio=0.5."),
    ] = None,
    on: Place = "local",
    image: Image = None,
    profile: Cluster = "plain",
    mutable_image: Mutable = False,
    home: Home = HOME,
) -> None:
    """Recompress a release, measure it and register it. Exit status 0: the rules hold; 3: a rule fails; 1: an error."""
    runner = runner_on(on, image, profile, mutable_image)
    _run(load_recipe(find_recipe(recipe), set_ or ()), model, name, home, runner)


@app.command("compile")
def compile_(
    profile: Cluster = "plain",
    image: Image = None,
    mutable_image: Mutable = False,
    out: Annotated[Path | None, typer.Option(help="The file to write; the terminal when absent.")] = None,
) -> None:
    """Write the pipeline as the YAML that Kubeflow takes."""
    from pipeline.kubeflow.compile import compile_pipeline
    from pipeline.kubeflow.profile import Profile
    from pipeline.recompress import recompress

    text = compile_pipeline(recompress, Profile.load(profile, image), mutable_image)
    write_or_print(text, out)


@app.command()
def demo(
    home: Home = HOME,
    real: Annotated[
        bool, typer.Option("--real", help="Recompress SmolLM2-135M-Instruct out of a package, and show its answers.")
    ] = False,
) -> None:
    """Train a small release on text of this machine, and recompress it."""
    if real:
        _demo_real(home)
        return
    from pipeline.demo.release import OVERRIDES, make_release
    from pipeline.runners.progress import bar

    with bar("making a release", console) as journal:
        release = make_release(home / "demo", journal=journal)
    recipe = load_recipe(find_recipe("trsp"), [*OVERRIDES, *release.overrides()])
    _run(recipe, str(release.model), "demo", home, runner_on("local"))


def _demo_real(home: Path) -> None:
    from pipeline.demo.real import OVERRIDES, make_real_release

    console.print("unpacking the model")
    release = make_real_release(home / "demo-real")
    recipe = load_recipe(find_recipe("shortgpt"), [*OVERRIDES, *release.overrides()])
    _run(recipe, str(release.model), "demo-real", home, runner_on("local"))


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    for path in sorted(RECIPES.glob("*.yaml")):
        first = path.read_text().splitlines()[0].lstrip("# ")
        console.print(f"[bold]{path.stem}[/bold]  {first}\n  {path}", highlight=False, soft_wrap=True)


@services_app.command("up")
def services_up(home: Home = HOME) -> None:
    """Start the services, and print the environment that names them."""
    from pipeline.services.embedded import Services

    for variable, value in Services(home).up().items():
        print(f"export {variable}={value}")


@services_app.command("down")
def services_down(home: Home = HOME) -> None:
    """Stop the services."""
    from pipeline.services.embedded import Services

    Services(home).down()


@services_app.command("status")
def services_status(home: Home = HOME) -> None:
    """Show which services run, and their addresses."""
    from pipeline.services.embedded import Services

    table = Table("service", "address", "pid", "running")
    for service in Services(home).status():
        table.add_row(service.name, service.address, str(service.pid or ""), "yes" if service.running else "no")
    console.print(table)


def _run(recipe: Recipe, model: str, name: str, home: Path, runner: Runner) -> None:
    from pipeline.cli.summary import print_summary
    from pipeline.runners.run import run as recompress

    result = recompress(recipe, model, name, home, console, on=runner)
    print_summary(result.report, console)
    if runner.embeds:
        console.print(
            f"MLflow: espalier services up --home {home}, then open the MLFLOW_TRACKING_URI that it prints",
            highlight=False,
            soft_wrap=True,
        )
    print(result.folder / "report.html")
    print(result.folder / "report.json")
    raise typer.Exit(PASS if result.report.verdict.passed else FAIL)


def main() -> None:
    """Run a verb; print a refusal as one sentence on standard error."""
    try:
        app(standalone_mode=True)
    except Refusal as refusal:
        print(f"espalier: {refusal}", file=sys.stderr)
        raise SystemExit(ERROR) from None
    except (OSError, MemoryError) as error:
        mendable = of_machine(error)
        if mendable is None:
            raise
        print(f"espalier: {mendable}", file=sys.stderr)
        raise SystemExit(ERROR) from None
    except StageFailed as failure:
        print(
            f"espalier: {failure}; finished outputs are kept, and the same command continues from there",
            file=sys.stderr,
        )
        raise SystemExit(ERROR) from None


if __name__ == "__main__":
    main()
