"""Find the sources that are new: no version in the registry was made from their revision.

The field `recompress_on` of a source lists the changes that make it new again: another revision always, another recipe or other
code if they are listed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe, Text
from components.lib.sources.resolve import Resolved, checkpoint_files, resolve_release, resolve_text
from components.lib.sources.tasks import task_digest
from components.lib.stage.code import ROOT, code_of
from components.lib.store.artifacts import Manifest, Reference, describe
from components.lib.store.claims import Claims
from components.lib.store.store import Store
from components.lib.tracking import client, registry
from components.lib.transformer.dequantise import opened
from components.lib.transformer.gguf import gguf_of

Reason = Literal["release", "recipe", "code"]


class Watched(BaseModel):
    """A watched source: the arguments of `recompress`, before its revision is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    release: str
    """A Hub id, an s3:// prefix, models:/name@alias, or a folder of this machine."""
    name: str
    """The registered model's name."""
    recipe: str
    """The recipe's YAML."""
    recompress_on: Annotated[tuple[Reason, ...], Field(min_length=1)] = ("release",)
    """The changes that make the source new: of the release, of the recipe (its texts included), of the code."""

    @field_validator("recompress_on")
    @classmethod
    def _with_release(cls, value: tuple[Reason, ...]) -> tuple[Reason, ...]:
        if "release" not in value:
            raise ValueError("recompress_on always holds release: add it")
        return tuple(reason for reason in get_args(Reason) if reason in value)


@dataclass(frozen=True)
class Item:
    """A source at one revision, and the key of the version to be made from it."""

    name: str
    release: str
    """The source, with its revision if the kind of source can name one."""
    recipe: str
    revision: str
    key: str
    """The key that the version is tagged with: a digest of the parts in `recompress_on`."""
    claim: str
    """The key of the claims on it: a digest of release, recipe and code, so that a failure counts until one of them changes."""


@dataclass(frozen=True)
class Finding:
    """The state of a source."""

    watched: Watched
    state: Literal["new", "registered", "claimed", "failed", "refused"]
    detail: str
    item: Item | None = None


def identify(watched: Watched, store: Store) -> Item:
    """Resolve a source without downloading it, and return its item.

    The key is a sha256 over source and revision; if `recompress_on` lists recipe, also over the recipe and its texts' revisions;
    if it lists code, also over the code of every stage that has an output.

    Raises:
        Refusal: the recipe cannot be read, or the source or one of its texts cannot be found.
    """
    recipe = parse_recipe(watched.recipe)
    release, identity = _release(watched.release, store)
    everything: dict[Reason, Any] = {
        "release": identity,
        "recipe": {
            "texts": {dotted: _text(text, store) for dotted, text in recipe.texts()},
            "fields": _without_paths(recipe).model_dump(mode="json"),
            "tasks": [task_digest(task, recipe.evaluate.remote_code, store) for task in recipe.evaluate.task_files],
        },
        "code": {stage: code_of(stage).digest for stage in _stages()},
    }
    key = _digest({reason: everything[reason] for reason in watched.recompress_on})
    return Item(watched.name, release, watched.recipe, identity[-1], key, claim=_digest(everything))


def _without_paths(recipe: Recipe) -> Recipe:
    """Return the recipe without the paths of its texts and task files: their content counts."""
    texts = {dotted: "" for dotted, _ in recipe.texts()}
    return recipe.with_texts(texts).with_tasks(dict.fromkeys(recipe.evaluate.task_files, "/"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def look(watched: Watched, store: Store, claims: Claims) -> Finding:
    """Return whether a source is new, and the reason."""
    try:
        item = identify(watched, store)
    except Refusal as error:
        return Finding(watched, "refused", str(error))
    version = registry.made_for(item.name, item.key)
    if version:
        claims.clear(item.name, item.claim)
        return Finding(watched, "registered", f"as version {version.version}", item)
    standing = claims.standing(item.name, item.claim)
    if standing.state == "free":
        return Finding(watched, "new", _why_new(item, watched), item)
    return Finding(watched, standing.state, standing.detail, item)


def _why_new(item: Item, watched: Watched) -> str:
    """Return the reason why an item is new."""
    version = registry.made_of_revision(item.name, item.revision)
    if version is None:
        return f"no version of {item.name} is of this revision ({item.revision[:12]})"
    others = " or ".join(reason for reason in watched.recompress_on if reason != "release") or "name"
    return f"version {version.version} is of this revision, by another {others}"


def take(item: Item, claims: Claims) -> str | None:
    """Claim an item. Return the label of the run to make, or None if another watcher has it or has just finished it."""
    run = claims.take(item.name, item.claim, item.key)
    if run and registry.made_for(item.name, item.key):
        claims.drop(item.name, item.claim, run)
        return None
    return run


def find_new(
    sources: Sequence[Mapping[str, str]], at_most: int, lease: timedelta
) -> tuple[list[dict[str, str]], list[Finding]]:
    """Claim at most `at_most` of the new items; the next call finds the others.

    Returns:
        the `loop_item` of each claimed item, and the finding for every source.

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
    """Return the arguments of `recompress` for an item. The registered name is `model`, because a loop's item has a `name` of its own."""
    return {"release": item.release, "recipe": item.recipe, "model": item.name, "run": run}


def table(findings: Sequence[Finding], runs: Sequence[Mapping[str, str]]) -> str:
    """Return the findings as Markdown, for Kubeflow's user interface."""
    claimed = {(run["model"], run["release"]) for run in runs}
    rows = ["| name | release | state | |", "|---|---|---|---|"]
    for finding in findings:
        item = finding.item
        state = "**taken**" if item and (item.name, item.release) in claimed else finding.state
        detail = finding.detail.replace("|", "\\|").replace("\n", " ")
        rows.append(f"| {finding.watched.name} | {finding.watched.release} | {state} | {detail} |")
    return "\n".join(rows) + "\n"


def _release(release: str, store: Store) -> tuple[str, list[str]]:
    """Return the release at its revision, and its identity: a digest of the content, or source and revision."""
    if "@sha256:" in release:
        return release, [Reference.parse(release).digest]
    folder = Path(release).expanduser()
    if folder.exists():
        file = gguf_of(folder)
        files = {file.name: file} if file else checkpoint_files(opened(folder))
        # The digest that the folder has in the store, unless it is unpacked.
        return release, [Manifest(files=tuple(describe(path, name) for name, path in files.items())).digest]
    resolved = resolve_release(release, store)
    return _at_revision(resolved), [resolved.source, resolved.revision]


def _at_revision(resolved: Resolved) -> str:
    if resolved.source.startswith(("s3://", "models:/")):
        return resolved.source
    return f"{resolved.source}@{resolved.revision}"


def _text(text: Text, store: Store) -> list[str]:
    """Return the identity of a text: a digest of the content, or source and revision; then the column that is read."""
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
    """Return the stages that shape a version: those with an output of their own."""
    return sorted(path.parent.name for path in (ROOT / "components").glob("*/stage.py"))
