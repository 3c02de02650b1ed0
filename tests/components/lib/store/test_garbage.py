"""Garbage in a real S3: what nothing needs is found and deleted, and what a version or a young run needs is kept."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from components.lib.errors import Unavailable
from components.lib.store import garbage
from components.lib.store.artifacts import MANIFEST, Reference
from components.lib.store.garbage import Piece, piece_of, pieces, sweep
from components.lib.store.runs import leave_stage, leave_uses
from components.lib.store.store import PrefixCheckpoints, Store

DAYS = 86400


class Shelf:
    """A store whose objects a test can make older."""

    def __init__(self, store: Store, behind: Path, folder: Path) -> None:
        self.store = store
        self._behind = behind
        self._folder = folder

    def made(self, prefix: str, inputs: Mapping[str, Reference] | None = None) -> Reference:
        """Put an artifact that was made of others."""
        given = {name: str(reference) for name, reference in (inputs or {}).items()}
        return self.store.put(self._folder, prefix, {"inputs": given})

    def age(self, *prefixes: str, days: float = 40) -> None:
        """Make everything below the prefixes so old."""
        for prefix in prefixes:
            for path in (self._behind / prefix).rglob("*"):
                os.utime(path, (time.time() - days * DAYS,) * 2)
        time.sleep(1.2)  # the server remembers a folder for a second

    def before(self) -> datetime:
        """Thirty days ago."""
        return self.store.clock() - timedelta(days=30)

    def garbage(self, *roots: str, spent: tuple[str, ...] = ()) -> list[str]:
        """Return the names of the garbage."""
        return [piece.prefix for piece in garbage.garbage(self.store, roots, self.before(), spent)]


@pytest.fixture
def shelf(store: Store, s3_home: Path, folder: Path) -> Shelf:
    return Shelf(store, s3_home / "s3" / store.bucket / store.prefix, folder)


@pytest.fixture
def lineage(shelf: Shelf) -> Shelf:
    """A release, a model that was trained of it, and a candidate that was cut of that, forty days old."""
    release = shelf.made("releases/r")
    trained = shelf.made("stages/regularize/t", {"model": release})
    shelf.made("stages/prune/c", {"model": trained})
    shelf.age("releases", "stages")
    return shelf


def test_what_a_root_was_made_of_is_kept(lineage: Shelf) -> None:
    assert lineage.garbage("stages/prune/c") == []
    assert lineage.garbage("stages/regularize/t") == ["stages/prune/c"]
    assert lineage.garbage() == ["releases/r", "stages/prune/c", "stages/regularize/t"]


def test_what_a_root_was_made_of_and_does_not_need_goes_if_it_is_asked_for(lineage: Shelf) -> None:
    assert lineage.garbage("stages/prune/c", spent=("regularize", "prune")) == ["stages/regularize/t"]


def test_what_a_young_artifact_was_made_of_is_kept(lineage: Shelf) -> None:
    found = lineage.store.find("stages/regularize/t")
    assert found
    lineage.made("stages/prune/d", {"model": found})
    assert lineage.garbage() == ["stages/prune/c"]


def test_what_a_young_run_found_is_kept_with_what_that_was_made_of(lineage: Shelf) -> None:
    found = lineage.store.find("stages/regularize/t")
    assert found
    leave_uses("one", "regularize", [found, f"s3://elsewhere/stages/regularize/t@sha256:{'a' * 64}"], lineage.store)
    assert lineage.garbage() == ["stages/prune/c"]
    lineage.age("runs")
    assert lineage.garbage() == ["releases/r", "stages/prune/c", "stages/regularize/t"]
    leave_stage("one", "prune")  # it works still
    assert lineage.garbage() == ["stages/prune/c"]


def test_checkpoints_of_dead_runs_and_uploads_that_never_ended_are_garbage(shelf: Shelf, folder: Path) -> None:
    checkpoints = PrefixCheckpoints(shelf.store, "checkpoints/k/dense-trained")
    checkpoints.save(folder, 10)
    shelf.store.write_text("stages/prune/half/model/weights", "half")
    shelf.store.write_text("runs/one/report.json", "{}")
    shelf.store.write_text("elsewhere/thing", "of another program")
    assert shelf.garbage() == []
    shelf.age("checkpoints", "stages", "runs", "elsewhere")
    found = garbage.garbage(shelf.store, (), shelf.before())
    assert [(one.prefix, one.kind) for one in found] == [
        ("checkpoints/k", "checkpoints"),
        ("stages/prune/half", "unfinished uploads"),
    ]
    assert found[1].bytes == 4
    checkpoints.save(folder, 20)
    assert shelf.garbage() == ["stages/prune/half"]


def test_a_sweep_deletes_the_pieces_and_nothing_else(lineage: Shelf) -> None:
    found = garbage.garbage(lineage.store, ["stages/regularize/t"], lineage.before())
    assert [piece.prefix for piece in sweep(lineage.store, found, lineage.before())] == ["stages/prune/c"]
    assert [(piece.prefix, piece.whole) for piece in pieces(lineage.store)] == [
        ("releases/r", True),
        ("stages/regularize/t", True),
    ]


def test_a_sweep_keeps_what_was_found_or_made_since_it_was_listed(lineage: Shelf, folder: Path) -> None:
    found = garbage.garbage(lineage.store, (), lineage.before())
    reference = lineage.store.find("stages/regularize/t")
    assert reference
    leave_uses("one", "regularize", [reference], lineage.store)
    lineage.store.delete("stages/prune/c")
    lineage.store.put(folder, "stages/prune/c")
    assert [piece.prefix for piece in sweep(lineage.store, found, lineage.before())] == ["releases/r"]


def test_an_artifact_that_is_sealed_while_it_is_deleted_is_whole_or_gone(
    shelf: Shelf, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`put` looked at the files before they were deleted, and writes the manifest after the manifest was."""
    shelf.made("stages/prune/c")
    store, delete = shelf.store, Store._delete
    sealed = (store.read_text(f"stages/prune/c/{MANIFEST}") or "", [])

    def delete_and_seal(self: Store, key: str) -> None:
        delete(self, key)
        if not key.endswith(MANIFEST) and not sealed[1]:
            sealed[1].append(key)
            store.write_text(f"stages/prune/c/{MANIFEST}", sealed[0])

    monkeypatch.setattr(Store, "_delete", delete_and_seal)
    store.delete("stages/prune/c")
    assert sealed[1]
    assert store.find("stages/prune/c") is None
    assert store.objects("stages/prune/c") == []


def test_files_that_are_deleted_before_the_manifest_is_written_are_sent_again(
    shelf: Shelf, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write, lost = shelf.store, Store._write, []

    def write_too_late(self: Store, uri: str, text: str) -> None:
        if not lost:
            lost.append(uri)
            self.delete("stages/prune/c")
        write(self, uri, text)

    monkeypatch.setattr(Store, "_write", write_too_late)
    reference = store.put(folder, "stages/prune/c")
    assert lost
    store.verify(reference)


def test_a_server_that_deletes_nothing_is_named(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.made("stages/prune/c")
    monkeypatch.setattr(Store, "_delete", lambda self, key: None)
    with pytest.raises(Unavailable, match="does not delete"):
        shelf.store.delete("stages/prune/c")


def test_a_piece_is_named_by_any_address_in_it(store: Store) -> None:
    uri = store.uri("stages/prune/c")
    for address in (uri, f"{uri}/model", f"{uri}@sha256:{'a' * 64}"):
        assert piece_of(store, address) == "stages/prune/c"
    for address in (store.uri("stages/prune"), store.uri("runs/a/b/c"), "s3://elsewhere/stages/prune/c", "", "None"):
        assert piece_of(store, address) is None


@pytest.mark.parametrize(
    ("prefix", "whole", "kind"),
    [("stages/control/k", True, "control"), ("texts/k", True, "texts"), ("texts/k", False, "unfinished uploads")],
)
def test_a_piece_has_a_kind(prefix: str, whole: bool, kind: str) -> None:
    assert Piece(prefix, 1, datetime.now(), whole).kind == kind
