"""Pin the inputs of a run by digest, so that they cannot change during it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.lib.checks import check_finite, check_release
from components.lib.errors import Refusal
from components.lib.recipe.schema import Corpus, Recipe, Text
from components.lib.sources.resolve import Resolved, checkpoint_files, resolve_release, resolve_text
from components.lib.sources.shards import SHARDS, list_shards
from components.lib.store.artifacts import Manifest, describe
from components.lib.store.store import Reference, Store
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.dequantise import opened, packing
from components.lib.transformer.gguf import gguf_of, promised, unpack
from components.lib.transformer.surgery import text_alone, write
from components.lib.transformer.text import SUFFIXES
from components.pin.tasks import pin_task


def pin_release(release: str, recipe: Recipe, store: Store) -> Reference:
    """Snapshot a release into the store; a snapshot that is there already is not fetched again.

    Args:
        release: a reference, an `s3://` prefix, `models:/name@alias`, or a Hub id with an optional `@revision`, which a GGUF file may follow
            (`owner/name/file.gguf@revision`).

    Raises:
        Refusal: it cannot be found, or is no checkpoint that the recipe can be applied to.
    """
    if "@sha256:" in release:
        return _checked(Reference.parse(release), recipe, store)
    resolved = resolve_release(release, store)
    prefix = _prefix(resolved, recipe)
    found = store.find(prefix)
    if found:
        return _checked(found, recipe, store)
    with tempfile.TemporaryDirectory(prefix="espalier-pin-") as scratch:
        return _fetch(
            resolved,
            prefix,
            store,
            lambda folder: _release_files(folder, recipe, Path(scratch) / "made"),
            lambda folder: _origin(folder, recipe),
        )


def _prefix(resolved: Resolved, recipe: Recipe) -> str:
    """Return the snapshot's place in the store: the text model of a release lies beside the whole release."""
    return f"releases/{resolved.prefix}{'-text' if recipe.text_only else ''}"


def _asked_for(folder: Path, recipe: Recipe, scratch: Path) -> PrunableCheckpoint:
    """Return the checkpoint of a release; written to `scratch` if its text model alone is asked for, or if its weights are unpacked."""
    checkpoint = check_checkpoint(folder, recipe)
    if gguf_of(folder):
        unpack(folder, scratch)
    elif packing(folder) or (recipe.text_only and opened(folder).family.wraps):
        write(checkpoint, scratch)
    else:
        return checkpoint
    return check_checkpoint(scratch, recipe)


def _release_files(folder: Path, recipe: Recipe, scratch: Path) -> dict[str, Path]:
    """Return the files to store of the checkpoint in the folder, by their names there. Raises Refusal if a weight is not finite."""
    checkpoint = _asked_for(folder, recipe, scratch)
    check_finite(checkpoint)
    return checkpoint_files(checkpoint)


def _checked(release: Reference, recipe: Recipe, store: Store) -> Reference:
    """Check the configuration and the headers of the weights of a release in the store, and return its reference."""
    with tempfile.TemporaryDirectory(prefix="espalier-pin-") as scratch:
        folder = store.get_headers(release, Path(scratch) / "release") / "model"
        check_checkpoint(folder, recipe)
        if recipe.text_only and PrunableCheckpoint.open(folder).family.wraps:
            raise Refusal(
                f"text_only is true, but {release} is a release with its other towers, which is stored already: name its source, or set "
                "text_only to false"
            )
    return release


def pin_folder(folder: Path, recipe: Recipe, store: Store) -> Reference:
    """Put a release from a folder of this machine into the store: weights, configuration, tokenizer, card and licence only.

    Args:
        folder: the folder, or a GGUF file.
        recipe: the recipe that it is for.
        store: the store.

    Raises:
        Refusal: it is not a checkpoint that the recipe can be applied to.
    """
    with (
        tempfile.TemporaryDirectory(prefix="espalier-pin-") as scratch,
        _linked(_release_files(folder, recipe, Path(scratch) / "made")) as artifact,
    ):
        return store.put_content(
            artifact, "releases", {"source": str(folder), "revision": None, **_origin(folder, recipe)}
        )


def _origin(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Return what the release's lineage says of a folder that is not stored as it is."""
    file = gguf_of(folder)
    if file is not None:
        promise = promised(file)
        return {"gguf": promise.types, **({"heads": list(promise.heads)} if promise.heads else {})}
    found, family = packing(folder), opened(folder).family
    return {
        **({"dequantised": found} if found else {}),
        **({"taken_out_of": family.title} if recipe.text_only and family.wraps else {}),
    }


def pin_text(text: Text, store: Store) -> Reference:
    """Put a text into the store as an artifact of one file, `text` with its suffix; of a streamed one the list of its files.

    Raises:
        Refusal: it cannot be found, or its kind is not known.
    """
    if text.path and "@sha256:" in text.path:
        return Reference.parse(text.path)
    if isinstance(text, Corpus) and text.stream:
        with _listed(text, store) as listing:
            return store.put_content(listing, "texts", {"source": text.hub or text.path})
    if text.path and not text.path.startswith("s3://"):
        file = check_text(text.path)
        with _linked({f"text{file.suffix}": file}) as artifact:
            return store.put_content(artifact, "texts", {"source": text.path})
    resolved = resolve_text(text, store)
    prefix = f"texts/{resolved.prefix}"
    return store.find(prefix) or _fetch(resolved, prefix, store, lambda folder: _text_files(folder, resolved.source))


def pin_files(recipe: Recipe, store: Store, wanted: Callable[[str | None], bool] = lambda path: True) -> Recipe:
    """Put the recipe's texts and task files into the store, and return the recipe with references in their places.

    Args:
        recipe: the recipe.
        store: the store.
        wanted: takes the path of a text (None for one of the Hub) or task file, and says whether it is pinned; the others stay as they are.

    Raises:
        Refusal: as `pin_text` and `pin_task`.
    """
    texts = {dotted: str(pin_text(text, store)) for dotted, text in recipe.texts() if wanted(text.path)}
    tasks = {
        task: str(pin_task(task, recipe.evaluate.remote_code, store))
        for task in recipe.evaluate.task_files
        if wanted(task)
    }
    return recipe.with_texts(texts).with_tasks(tasks)


@contextmanager
def _listed(text: Corpus, store: Store) -> Iterator[Path]:
    """Yield a folder with the list of a streamed text's files."""
    with tempfile.TemporaryDirectory(prefix="espalier-pin-") as scratch:
        (Path(scratch) / SHARDS).write_text(list_shards(text, store).model_dump_json(indent=1))
        yield Path(scratch)


def find_release(release: str, recipe: Recipe, store: Store) -> Reference | None:
    """Return the reference that pinning the release would give, if its snapshot is in the store; nothing is fetched or stored.

    Args:
        release: as `pin_release` takes it, or a folder or a GGUF file of this machine.

    Raises:
        Refusal: it cannot be found, or is no checkpoint that the recipe can be applied to.
    """
    if "@sha256:" in release:
        return Reference.parse(release)
    folder = Path(release).expanduser()
    if folder.exists():
        with tempfile.TemporaryDirectory(prefix="espalier-pin-") as scratch:
            files = checkpoint_files(_asked_for(folder, recipe, Path(scratch) / "made"))
            return store.find(f"releases/{digest_of(files)}")
    return store.find(_prefix(resolve_release(release, store), recipe))


def find_text(text: Text, store: Store) -> Reference | None:
    """Return the reference that pinning the text would give, if it is in the store; nothing is fetched or stored."""
    if text.path and "@sha256:" in text.path:
        return Reference.parse(text.path)
    if isinstance(text, Corpus) and text.stream:
        with _listed(text, store) as listing:
            return store.find(f"texts/{Manifest.of(listing).digest}")
    if text.path and not text.path.startswith("s3://"):
        file = check_text(text.path)
        return store.find(f"texts/{digest_of({f'text{file.suffix}': file})}")
    return store.find(f"texts/{resolve_text(text, store).prefix}")


def digest_of(files: Mapping[str, Path]) -> str:
    """Return the digest of the artifact that holds these files under these names (hex)."""
    return Manifest(files=tuple(describe(path, name) for name, path in files.items())).digest


def check_checkpoint(folder: Path, recipe: Recipe) -> PrunableCheckpoint:
    """Open a checkpoint. Raises Refusal if the recipe cannot be applied to it, before any work."""
    checkpoint = opened(folder)
    if recipe.text_only and checkpoint.family.wraps:
        checkpoint = text_alone(checkpoint)
    check_release(checkpoint, recipe)
    return checkpoint


def check_text(path: str) -> Path:
    """Return the text's file. Raises Refusal if there is none, or its kind is not known."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise Refusal(
            f"the text {path} is not a file here: check the path, or name an s3:// object or a Hub data set (hub: owner/name)"
        )
    return _of_known_kind(file, path)


def _of_known_kind(file: Path, source: str) -> Path:
    if file.suffix not in SUFFIXES:
        raise Refusal(f"the text {source} ends in {file.suffix!r}: use one of {', '.join(SUFFIXES)}")
    return file


def _text_files(folder: Path, source: str) -> dict[str, Path]:
    """Return the one file of a fetched text, by its name in the artifact."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if len(files) != 1:
        raise Refusal(
            f"the text {source} holds {len(files)} files: name one of them, or set stream to true to calibrate on a folder of parquet files"
        )
    return {f"text{files[0].suffix}": _of_known_kind(files[0], source)}


def _fetch(
    resolved: Resolved,
    prefix: str,
    store: Store,
    files: Callable[[Path], dict[str, Path]],
    said: Callable[[Path], dict[str, Any]] = lambda folder: {},
) -> Reference:
    """Fetch a snapshot and store the files of its folder that `files` chooses, with what `said` adds to its lineage."""
    with tempfile.TemporaryDirectory(prefix="espalier-pin-") as scratch:
        folder = resolved.fetch(Path(scratch) / "fetched")
        with _linked(files(folder)) as artifact:
            return store.put(
                artifact, prefix, {"source": resolved.source, "revision": resolved.revision, **said(folder)}
            )


@contextmanager
def _linked(files: dict[str, Path]) -> Iterator[Path]:
    """Yield a folder of links to the files under their new names, so that they are stored without being copied first."""
    with tempfile.TemporaryDirectory(prefix="espalier-pin-") as scratch:
        for name, path in files.items():
            link = Path(scratch) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        yield Path(scratch)
