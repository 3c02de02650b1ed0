"""The verbs on registered versions: `models`, `diff`, `promote` and `rollback`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from components.lib.errors import Refusal
from pipeline.cli.options import HOME, PASS, Home, connected, console

if TYPE_CHECKING:
    from components.lib.tracking.registry import Version
    from components.lib.tracking.trail import Promotion
    from components.promote.promote import Choice, Promoted

Name = Annotated[str, typer.Argument(help="The registered model's name.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Why = Annotated[str, typer.Option(help="The reason, for the trail of promotions.")]


def models(name: Name, home: Home = HOME) -> None:
    """List the versions of a registered model with their evidence and aliases, and the promotions there were."""
    with _connected(name, home):
        from components.lib.tracking import registry, trail

        versions, promotions = registry.versions(name), trail.trail(name)
    if not versions:
        raise Refusal(f"no model is registered under the name {name!r}: espalier run --name {name} registers one")
    console.print(_versions(versions))
    for one in promotions:
        console.print(escape(_promotion(one)), highlight=False, soft_wrap=True)


def diff(
    name: Name,
    before: Annotated[str, typer.Argument(metavar="V1", help="A version, or an alias.")],
    now: Annotated[str, typer.Argument(metavar="V2", help="Another version, or an alias.")],
    home: Home = HOME,
) -> None:
    """Say what differs between two versions: release, recipe, data, code, libraries, what was removed, and figures."""
    with _connected(name, home):
        from components.lib.store.store import Store
        from components.lib.tracking import registry
        from components.register.changes import changes, report_of

        store = Store.from_environment()
        pair = [registry.find_version(f"{name}@{version}") for version in (before, now)]
        found = changes(*(report_of(version, store) for version in pair))
    if not found:
        console.print(f"{name}: nothing differs between version {pair[0].version} and version {pair[1].version}")
        return
    table = _table("", "", f"version {pair[0].version}", f"version {pair[1].version}", "")
    part = ""
    for change in found:
        shown = change.part if change.part != part else ""
        table.add_row(shown, *map(escape, (change.name, change.before, change.now, change.note)))
        part = change.part
    console.print(table)


def promote(
    name: Name,
    version: Annotated[str, typer.Option(help="Its version; the challenger when absent.")] = "",
    yes: Yes = False,
    force: Annotated[
        bool, typer.Option("--force", help="Promote a version that failed, or was compared with another champion.")
    ] = False,
    why: Why = "",
    home: Home = HOME,
) -> None:
    """Show the challenger beside the champion, ask, check the files, load and generate, and move the alias."""
    with _connected(name, home):
        from components.promote.promote import choose
        from components.promote.promote import promote as make_champion

        choice = choose(name, version, force)
        _show(choice)
        champion = choice.champion.version if choice.champion else ""
        _ask(f"Make version {choice.candidate.version} of {name} champion?", yes)
        told = make_champion(name, choice.candidate.version, force=force, why=why, over=champion)
    _tell(told)


def rollback(name: Name, yes: Yes = False, why: Why = "", home: Home = HOME) -> None:
    """Make the previous champion champion again, after the same checks of its files."""
    with _connected(name, home):
        from components.lib.tracking import registry
        from components.promote.promote import rollback as make_previous_champion

        previous = registry.aliased(name, "previous")
        if previous:
            _ask(f"Make version {previous.version} of {name} champion again?", yes)
        told = make_previous_champion(name, why=why)
    _tell(told)


@contextmanager
def _connected(name: str, home: Path) -> Iterator[None]:
    """Check the model's name, then name the services in the environment for the block."""
    from pipeline.runners.run import check_name

    check_name(name)
    with connected(home):
        yield


def _ask(question: str, yes: bool) -> None:
    """Ask on the terminal. Raises Refusal if there is none and the answer was not given."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refusal(f"{question} There is no terminal to ask on: pass --yes")
    if not typer.confirm(question):
        console.print("nothing was changed")
        raise typer.Exit(PASS)


def _show(choice: Choice) -> None:
    """Print the report of the candidate's run, which measured the champion too, if the store has it; else its tags."""
    from components.lib.store.store import Store
    from components.register.changes import report_of
    from pipeline.cli.summary import print_summary

    versions = [one for one in (choice.champion, choice.candidate) if one]
    console.print(_versions(versions))
    try:
        report = report_of(choice.candidate, Store.from_environment())
    except Refusal as refusal:
        console.print(f"[dim]{escape(str(refusal))}[/]", highlight=False)
        return
    print_summary(report, console)


def _tell(told: Promoted) -> None:
    champion, checked = told.champion, told.checked
    was = f", and version {told.was} was it before" if told.was else ""
    if checked is None:
        console.print(f"{champion.name} version {champion.version} is champion already", highlight=False)
        return
    console.print(f"{champion.name} version {champion.version} is champion{was}: {champion.source}", highlight=False)
    console.print(
        f"{checked.files} files, {checked.bytes / 1e6:.1f} MB, match their digests (fetched and hashed in {checked.seconds:.1f} s); "
        f"{checked.signature}; after a greeting it generates {escape(repr(checked.answer))}",
        highlight=False,
    )


def _versions(versions: Sequence[Version]) -> Table:
    """Return each version with its aliases and verdict in a line, and its evidence below it."""
    table = _table("version", "", "")
    table.columns[-1].overflow = "fold"
    for one in versions:
        verdict, failed = (one.tags.get(f"espalier.{tag}", "missing") for tag in ("verdict", "failed"))
        broken = f", broken: {failed}" if failed not in ("none", "missing") else ""
        table.add_row(f"[bold]{one.version}[/]", f"[bold]{', '.join(one.aliases)}[/]", escape(f"{verdict}{broken}"))
        for name, value in _evidence(one).items():
            table.add_row("", name, escape(value))
    return table


def _evidence(version: Version) -> dict[str, str]:
    """Return what a version was made of and what it reached, in words; without what its tags do not tell."""
    tags = version.tags
    revision = tags.get("espalier.revision", "None")
    figures = [tag for tag in sorted(tags) if tag.startswith("perplexity.")]
    told = {
        "release": tags.get("espalier.release", "") + ("" if revision == "None" else f" at {revision}"),
        "removed": f"{tags.get('espalier.removed', '')} ({tags.get('espalier.ratio', '')})".removesuffix(" ()"),
        "perplexity": ", ".join(f"{tag.removeprefix('perplexity.')} {tags[tag]}" for tag in figures),
        "run": tags.get("espalier.run", ""),
        "code": f"{tags.get('espalier.version', '')} at {tags.get('espalier.commit', '')}".removesuffix(" at "),
        "checkpoint": tags.get("espalier.reference", ""),
        "promoted": " by ".join(filter(None, (tags.get(f"espalier.promoted_{one}", "") for one in ("at", "by")))),
    }
    return {name: value for name, value in told.items() if value.strip()}


def _promotion(one: Promotion) -> str:
    """Return one promotion as a line: when, what, who, why, and what was known of the version."""
    state = "" if one.state == "done" else f", {one.state}"
    why = f": {one.why}" if one.why else ""
    moved = f"{one.action} {one.source or 'none'} → {one.target}"
    return f"{one.at:%Y-%m-%d %H:%M:%S} UTC  {moved} by {one.by}{why} ({one.verdict}, {one.signature}{state})"


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
