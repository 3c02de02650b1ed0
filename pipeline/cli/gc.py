"""The verb `gc`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from components.lib.errors import Refusal
from pipeline.cli.options import HOME, Home, connected, console

if TYPE_CHECKING:
    from components.lib.store.garbage import Piece
    from components.lib.store.store import Store

OlderThan = Annotated[str, typer.Option(metavar="DAYS", help="How long runs and what they left are kept, such as 30d.")]
Lineage = Annotated[
    bool,
    typer.Option(
        "--lineage",
        help="Also the models that registered versions were made of or compared with: not needed to serve them.",
    ),
]
Forget = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A registered model that was deleted from MLflow: keep nothing for it."),
]


def gc(
    older_than: OlderThan = "30d",
    lineage: Lineage = False,
    forget: Forget = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete; without it they are only listed.")] = False,
    home: Home = HOME,
) -> None:
    """List, and with --yes delete, what no registered version and no younger run needs, and the bytes that this frees."""
    age = _age(older_than)
    with connected(home):
        from components.lib.store.garbage import garbage, sweep
        from components.lib.store.store import Store

        store = Store.from_environment()
        before = store.clock() - age
        found = garbage(store, _roots(store, forget or ()), before, _trained() if lineage else ())
        if yes:
            found = list(_told(sweep(store, found, before)))
        else:
            list(_told(found))
    _show(found, "freed" if yes else "to free")
    if found and not yes:
        console.print("Nothing was deleted: pass --yes to delete them.")


def _age(text: str) -> timedelta:
    """Parse `30d`. Raises Refusal for less than a day, because a stage at work may read what it found so long ago."""
    match = re.fullmatch(r"([1-9]\d{0,4})d", text)
    if not match:
        raise Refusal(
            f"--older-than is {text!r}: write whole days, 1d at least, such as 30d; longer than your longest stage"
        )
    return timedelta(days=int(match[1]))


def _trained() -> list[str]:
    """Return the stages whose outputs are models: the largest part of a version's lineage."""
    from components.lib.stage.declaration import declared_stages

    return [stage.name for stage in declared_stages().values() if stage.leaves_checkpoint]


def _roots(store: Store, forgotten: Iterable[str]) -> list[str]:
    """Return the checkpoints and evaluations of all registered versions, and the models that their adapters belong to.

    Raises:
        Refusal: a report in the store names a registered model that MLflow does not know: it is not the MLflow of this store.
    """
    from components.lib.store.garbage import piece_of
    from components.lib.tracking import registry
    from components.register.run import ADAPTER_BASE, EVALUATION

    known = set(forgotten)
    for name, run in _reported(store):
        if name not in known and not registry.is_model(name):
            raise Refusal(
                f"the run {run} registered a version of {name}, and this MLflow knows no such model: name the MLflow of this store "
                f"(MLFLOW_TRACKING_URI), or pass --forget {name} if the model was deleted"
            )
        known.add(name)
    tags = [version.tags for version in registry.every_version()]
    kept = ("espalier.reference", EVALUATION, ADAPTER_BASE)
    named = [piece_of(store, one[tag]) for one in tags for tag in kept if tag in one]
    return [name for name in named if name]


def _reported(store: Store) -> Iterator[tuple[str, str]]:
    """Yield the registered model and the run of every report in the store that tells of a version."""
    reports = [name for name, *_ in store.objects("runs") if name.endswith("/report.json")]
    with ThreadPoolExecutor(8) as threads:
        for place, text in zip(reports, threads.map(store.read_text, reports), strict=True):
            registered = json.loads(text).get("registered") if text else None
            if registered:
                yield registered["name"], place.split("/")[1]


def _told(found: Iterable[Piece]) -> Iterator[Piece]:
    """Print each piece in a line as it passes."""
    for piece in found:
        line = f"{piece.changed:%Y-%m-%d}  {_bytes(piece.bytes):>9}  {piece.kind}  {piece.prefix}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        yield piece


def _show(found: Sequence[Piece], word: str) -> None:
    """Print how many pieces and bytes there are of each kind, and in sum."""
    table = Table("", "pieces", word, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    kinds = sorted({piece.kind for piece in found})
    for name, several in [*((kind, [one for one in found if one.kind == kind]) for kind in kinds), ("in sum", found)]:
        table.add_row(name, str(len(several)), _bytes(sum(one.bytes for one in several)))
    console.print(table)


def _bytes(size: int) -> str:
    """Return bytes in a unit of three digits."""
    power = 0
    while size >= 1000 ** (power + 1) and power < 4:
        power += 1
    return f"{size / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
