"""Find what is new: a source at a revision that no version in the registry was made of, by this recipe and this code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from components.lib.errors import Refusal
from components.lib.recipe.schema import Recipe, Text
from components.lib.sources.resolve import Resolved, checkpoint_files, resolve_release, resolve_text
from components.lib.stage.run import code_version
from components.lib.store.artifacts import Manifest, Reference, describe
from components.lib.store.store import Store
from components.lib.tracking import client, registry
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.watch.claims import Claims

NO_RESULT = {"watch", "promote", "finish"}
"""Stages that shape no version: a change to their code makes nothing new."""


class Watched(BaseModel):
    """A source to look at: what `recompress` is told of it, before its revision is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    release: str
    """A Hub id, an s3:// prefix, models:/name@alias, or a folder of this machine."""
    name: str
    """The registered model's name."""
    recipe: str
    """The recipe's YAML."""


@dataclass(frozen=True)
class Item:
    """A source at one revision, and the key that names what is to be made of it."""

    name: str
    release: str
    """Resolves to the same revision again, where the source can name one."""
    recipe: str
    revision: str
    key: str


@dataclass(frozen=True)
class Finding:
    """What became of looking at a source."""

    watched: Watched
    state: Literal["new", "registered", "claimed", "failed", "refused"]
    detail: str
    item: Item | None = None


def identify(watched: Watched, store: Store) -> Item:
    """Resolve a source, downloading nothing, and form the key of what is to be made of it.

    key = sha256(source, its revision, the recipe, its texts' revisions, the code of every stage that shapes the result)

    Raises:
        Refusal: the recipe cannot be read, or the source or one of its texts is not to be had.
    """
    recipe = Recipe.from_yaml(watched.recipe)
    release, identity = _release(watched.release, store)
    made_of = {
        "release": identity,
        "texts": {dotted: _text(text, store) for dotted, text in recipe.texts()},
        "recipe": recipe.with_texts({dotted: "" for dotted, _ in recipe.texts()}).model_dump(mode="json"),
        "code": {stage: code_version(stage) for stage in _stages()},
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return Item(watched.name, release, watched.recipe, identity[-1], key)


def look(watched: Watched, store: Store, claims: Claims) -> Finding:
    """Say whether a source is new, and if it is not, why not."""
    try:
        item = identify(watched, store)
    except Refusal as error:
        return Finding(watched, "refused", str(error))
    version = registry.made_for(item.name, item.key)
    if version:
        claims.clear(item.name, item.key)
        return Finding(watched, "registered", f"as version {version.version}", item)
    standing = claims.standing(item.name, item.key)
    return Finding(watched, "new" if standing.state == "free" else standing.state, standing.detail, item)


def take(item: Item, claims: Claims) -> str | None:
    """Claim an item. Returns the label of the run to make; None where another watcher has it, or has just finished it."""
    run = claims.take(item.name, item.key)
    if run and registry.made_for(item.name, item.key):
        claims.drop(item.name, item.key, run)
        return None
    return run


def find_new(
    sources: Sequence[Mapping[str, str]], at_most: int, lease: timedelta
) -> tuple[list[dict[str, str]], list[Finding]]:
    """Claim what is new, `at_most` items of it; the rest is left to the next time.

    Returns:
        what `loop_item` gives of each item claimed, and what was found of every source.

    Raises:
        Refusal: the store or MLflow does not answer.
    """
    store = Store.from_environment()
    store.check()
    client.check()
    claims = Claims(store, lease)
    findings = [look(Watched.model_validate(source), store, claims) for source in sources]
    runs: list[dict[str, str]] = []
    for finding in findings:
        if finding.state == "new" and finding.item and len(runs) < at_most:
            run = take(finding.item, claims)
            if run:
                runs.append(loop_item(finding.item, run))
    return runs, findings


def loop_item(item: Item, run: str) -> dict[str, str]:
    """What the pipeline `recompress` is told of an item. The registered name is `model`: a loop's item has a `name` of its own."""
    return {"release": item.release, "recipe": item.recipe, "model": item.name, "run": run}


def table(findings: Sequence[Finding], runs: Sequence[Mapping[str, str]]) -> str:
    """The findings as Markdown, for Kubeflow's user interface."""
    claimed = {(run["model"], run["release"]) for run in runs}
    rows = ["| name | release | state | |", "|---|---|---|---|"]
    for finding in findings:
        item = finding.item
        state = "**taken**" if item and (item.name, item.release) in claimed else finding.state
        detail = finding.detail.replace("|", "\\|").replace("\n", " ")
        rows.append(f"| {finding.watched.name} | {finding.watched.release} | {state} | {detail} |")
    return "\n".join(rows) + "\n"


def _release(release: str, store: Store) -> tuple[str, list[str]]:
    """Return the release at its revision, and what identifies it: content, or source and revision."""
    if "@sha256:" in release:
        return release, [Reference.parse(release).digest]
    folder = Path(release).expanduser()
    if folder.is_dir():
        files = checkpoint_files(PrunableCheckpoint.open(folder))
        # The digest that the folder has in the store.
        return release, [Manifest(files=tuple(describe(path, name) for name, path in files.items())).digest]
    resolved = resolve_release(release, store)
    return _at_revision(resolved), [resolved.source, resolved.revision]


def _at_revision(resolved: Resolved) -> str:
    if resolved.source.startswith(("s3://", "models:/")):
        return resolved.source
    return f"{resolved.source}@{resolved.revision}"


def _text(text: Text, store: Store) -> list[str]:
    """What identifies a text: its content, or its source and revision; and the column that is read."""
    if text.path and "@sha256:" in text.path:
        return [Reference.parse(text.path).digest, text.field]
    if text.path and Path(text.path).expanduser().is_file():
        return [describe(Path(text.path).expanduser(), "text").sha256, text.field]
    if text.path and not text.path.startswith("s3://"):
        raise Refusal(
            f"the text {text.path} is not a file here: check the path, or name an s3:// object or a Hub data set"
        )
    resolved = resolve_text(text, store)
    return [resolved.source, resolved.revision, text.field]


def _stages() -> list[str]:
    """The stages that shape a version, by the names of their folders."""
    root = Path(__file__).parents[1]
    return sorted({face.parent.name for face in root.glob("*/component.py")} - NO_RESULT)
