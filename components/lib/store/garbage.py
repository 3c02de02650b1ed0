"""Garbage: artifacts, checkpoints and unfinished uploads that nothing needs, found and deleted beside runs that work.

A piece is needed if it changed since the given time, if a run that changed since then found it (`runs.leave_uses`), if a root
names it, or if the manifest of a needed piece names it as an input. Times are S3's. Runs, claims and every other object of the
bucket are no pieces: they are kept.

A run may find a piece just before it is deleted. Then its next stage refuses with one sentence, and the same command makes the
piece again, because `Store.put` and `Store.delete` leave a whole artifact or none in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from components.lib.store.artifacts import MANIFEST
from components.lib.store.store import Store

PLACES = {"checkpoints": 2, "releases": 2, "stages": 3, "tasks": 2, "texts": 2}
"""The folders that hold pieces, and how many parts the name of a piece has."""

_AT_ONCE = 8
_BATCH = 50
"""So many pieces are deleted before it is asked again which pieces runs use."""


@dataclass(frozen=True)
class Piece:
    """An artifact, the checkpoints of one key, or an upload that never ended."""

    prefix: str
    bytes: int
    changed: datetime
    """When its newest object was written."""
    whole: bool
    """Whether it has a manifest; the checkpoints of a key have none of their own."""

    @property
    def kind(self) -> str:
        """`checkpoints`, `releases`, `tasks`, `texts`, `unfinished uploads`, or the stage that made it."""
        place, name = self.prefix.split("/")[:2]
        if not self.whole and place != "checkpoints":
            return "unfinished uploads"
        return name if place == "stages" else place


def pieces(store: Store) -> list[Piece]:
    """Return every piece of the store."""
    found: dict[str, list[tuple[str, int, datetime]]] = {}
    for place, parts in PLACES.items():
        for name, size, changed in store.objects(place):
            prefix = "/".join(name.split("/")[:parts])
            found.setdefault(prefix, []).append((name, size, changed))
    return [
        Piece(
            prefix,
            sum(size for _, size, _ in objects),
            max(changed for *_, changed in objects),
            any(name == f"{prefix}/{MANIFEST}" for name, *_ in objects),
        )
        for prefix, objects in found.items()
    ]


def garbage(store: Store, roots: Iterable[str], before: datetime, spent: Iterable[str] = ()) -> list[Piece]:
    """Return the pieces that nothing needs, by name.

    Args:
        store: the store.
        roots: the names of pieces that are needed whatever their age, such as the checkpoints of registered versions.
        before: the pieces and runs that changed since are needed.
        spent: the stages whose outputs the roots do not need, although they were made of them.
    """
    known = {piece.prefix: piece for piece in pieces(store)}
    young = {prefix for prefix, piece in known.items() if piece.changed >= before}
    needed = _with_inputs(store, young | used(store, before), known)
    roots = set(roots)
    lasting = _with_inputs(store, roots, known)
    needed |= roots | {prefix for prefix in lasting if not prefix.startswith(tuple(f"stages/{one}/" for one in spent))}
    return [known[prefix] for prefix in sorted(set(known) - needed)]


def used(store: Store, since: datetime) -> set[str]:
    """Return the names of the pieces that runs found which wrote anything since."""
    objects = store.objects("runs")
    runs = {name.split("/")[1] for name, _, changed in objects if changed >= since}
    uses = [name for name, *_ in objects if name.split("/")[1] in runs and name.split("/")[2] == "uses"]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        texts = threads.map(store.read_text, uses)
        lines = [line for text in texts if text for line in text.splitlines()]
    return {name for line in lines if (name := piece_of(store, line))}


def piece_of(store: Store, reference: str) -> str | None:
    """Return the name of the piece that a reference, or an address in it, names; None if it is not in this store."""
    uri = reference.partition("@sha256:")[0]
    start = f"{store.uri()}/"
    parts = uri.removeprefix(start).split("/")
    wanted = PLACES.get(parts[0], 0)
    return "/".join(parts[:wanted]) if uri.startswith(start) and wanted and len(parts) >= wanted else None


def sweep(store: Store, found: Sequence[Piece], before: datetime) -> Iterator[Piece]:
    """Delete the pieces; yield each that was deleted. Those that changed or were found by a run meanwhile are kept."""
    for start in range(0, len(found), _BATCH):
        taken = used(store, before)
        for piece in found[start : start + _BATCH]:
            fresh = any(changed >= before for *_, changed in store.objects(piece.prefix))
            if piece.prefix not in taken and not fresh:
                store.delete(piece.prefix)
                yield piece


def _with_inputs(store: Store, prefixes: Iterable[str], known: dict[str, Piece]) -> set[str]:
    """Return the pieces, those that their manifests name as inputs, and so on."""
    seen: set[str] = set()
    left = set(prefixes)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        while left:
            seen |= left
            whole = [prefix for prefix in left if prefix in known and known[prefix].whole]
            left = set().union(*threads.map(lambda prefix: _inputs(store, prefix), whole)) - seen
    return seen


def _inputs(store: Store, prefix: str) -> set[str]:
    """Return the names of the pieces that an artifact was made of."""
    manifest = store.manifest_of(prefix)
    inputs = manifest.metadata.get("inputs", {}) if manifest else {}
    return {name for text in inputs.values() if (name := piece_of(store, str(text)))}
