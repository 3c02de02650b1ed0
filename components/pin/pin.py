"""Pin what a run starts from, so that nothing it reads can change under it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.errors import Refusal
from components.recipe import Recipe, Text
from components.sources.resolve import CHECKPOINT_FILES, Resolved, resolve_release, resolve_text
from components.store import Reference, Store
from components.transformer.checkpoint import Checkpoint, layers_to_remove
from components.transformer.text import SUFFIXES, longest_context


def pin_release(release: str, recipe: Recipe, store: Store) -> Reference:
    """Snapshot a release into the store; what is there already is not fetched again.

    Args:
        release: a reference, an `s3://` prefix, `models:/name@alias`, or a Hub id with an optional `@revision`.

    Raises:
        Refusal: it is not to be had, or not a checkpoint that the recipe can be applied to.
    """
    if "@sha256:" in release:
        return Reference.parse(release)
    resolved = resolve_release(release, store)
    prefix = f"releases/{resolved.prefix}"
    return store.find(prefix) or _fetch(resolved, prefix, store, recipe)


def pin_folder(folder: Path, recipe: Recipe, store: Store) -> Reference:
    """Put a release that lies in a folder of this machine into the store, its weights, configuration and tokenizer alone.

    Raises:
        Refusal: the folder is not a checkpoint that the recipe can be applied to.
    """
    check_checkpoint(folder, recipe)
    files = {path.name: path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern)}
    with _linked({f"model/{name}": path for name, path in files.items()}) as artifact:
        return store.put_content(artifact, "releases", {"source": str(folder), "revision": None})


def pin_text(text: Text, store: Store) -> Reference:
    """Put a text into the store as an artifact of one file, `text` with its suffix.

    Raises:
        Refusal: it is not to be had, or its kind is not known.
    """
    if text.path and "@sha256:" in text.path:
        return Reference.parse(text.path)
    if text.path and not text.path.startswith("s3://"):
        file = check_text(text.path)
        with _linked({f"text{file.suffix}": file}) as artifact:
            return store.put_content(artifact, "texts", {"source": text.path})
    resolved = resolve_text(text, store)
    prefix = f"texts/{resolved.prefix}"
    return store.find(prefix) or _fetch(resolved, prefix, store)


def check_checkpoint(folder: Path, recipe: Recipe) -> None:
    """Refuse a checkpoint that the recipe cannot be applied to, before any work."""
    checkpoint = Checkpoint.open(folder)
    layers_to_remove(recipe.target.ratio, checkpoint.layers)
    most = longest_context(checkpoint.config)
    for field, length in recipe.lengths().items():
        if most is not None and length > most:
            raise Refusal(f"{field} is {length}, and the model reads {most} tokens at most: set it to {most} or less")


def check_text(path: str) -> Path:
    """Return the text's file. Raises Refusal where there is none, or its kind is not known."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise Refusal(
            f"the text {path} is not a file here: check the path, or name an s3:// object or a Hub data set (hub: owner/name)"
        )
    if file.suffix not in SUFFIXES:
        raise Refusal(f"the text {path} ends in {file.suffix!r}: use one of {', '.join(SUFFIXES)}")
    return file


def _fetch(resolved: Resolved, prefix: str, store: Store, recipe: Recipe | None = None) -> Reference:
    """Fetch a snapshot and store it; a release (the one with a recipe) is checked first, and lies in `model/`."""
    with tempfile.TemporaryDirectory(prefix="espalier-pin-") as scratch:
        folder = resolved.fetch(Path(scratch) / "artifact" / ("model" if recipe else ""))
        if recipe:
            check_checkpoint(folder, recipe)
        return store.put(Path(scratch) / "artifact", prefix, {"source": resolved.source, "revision": resolved.revision})


@contextmanager
def _linked(files: dict[str, Path]) -> Iterator[Path]:
    """A folder that holds links to files under other names, so that they are stored without being copied first."""
    with tempfile.TemporaryDirectory(prefix="espalier-pin-") as scratch:
        for name, path in files.items():
            link = Path(scratch) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        yield Path(scratch)
