"""Sources of releases and texts: resolve each to a fixed revision before anything is fetched."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from components.lib.errors import Refusal, Unavailable
from components.lib.recipe.schema import Text
from components.lib.store.store import Store
from components.lib.transformer.checkpoint import LICENCES, Checkpoint, checked
from components.lib.transformer.families import full_precision

if TYPE_CHECKING:
    from components.lib.tracking.registry import Version

_CARD = ("README.md", *LICENCES)

CHECKPOINT_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    *_CARD,
)
"""The files taken from a release: safetensors, configuration, tokenizer, model card and licence, never pickled weights or code."""

_OTHER_WEIGHTS = ("consolidated*", "*/*.safetensors")
"""Copies of the weights in the formats of other frameworks."""

T = TypeVar("T")


@dataclass(frozen=True)
class Resolved:
    """A source at one revision, with the function that fetches it."""

    source: str
    revision: str
    fetch: Callable[[Path], Path]
    """Makes the folder, fills it and returns it."""

    @property
    def prefix(self) -> str:
        """Return the snapshot's name in the store, a digest of source and revision, so that it is fetched once."""
        return hashlib.sha256(json.dumps([self.source, self.revision]).encode()).hexdigest()


def resolve_release(source: str, store: Store) -> Resolved:
    """Resolve `models:/name@alias`, `models:/name/version`, `s3://prefix` or a Hub id with an optional `@revision`.

    A GGUF file of the Hub is named by its path in the repository: `owner/name/file.gguf`.
    """
    if source.startswith("models:/"):
        return _registered(source, store)
    if source.startswith("s3://"):
        return _s3(source, store)
    return _hub_model(source)


def resolve_text(text: Text, store: Store) -> Resolved:
    """Resolve an `s3://` object or a Hub data set."""
    if text.hub:
        return _hub_text(text.hub, text)
    assert text.path is not None, "a text has a path or a Hub id"
    return _s3(text.path, store)


def release_config(source: str) -> str:
    """Return the config.json of a release that is not a folder, and read nothing else of it.

    Raises:
        Refusal: the release cannot be found, or has no config.json.
    """
    if source.startswith("models:/"):
        source = _registered_version(source).source
    if source.startswith("s3://"):
        return _config_on_s3(source, Store.from_environment())
    from huggingface_hub import hf_hub_download

    repository, _, revision = source.partition("@")
    if gguf_on_hub(repository):
        raise Refusal(
            f"{source} is a GGUF file, whose settings are read when it is fetched: fetch it, and name its path"
        )
    path = ask_hub(lambda: hf_hub_download(repository, "config.json", revision=revision or None), source, "release")
    return Path(path).read_text()


def _config_on_s3(source: str, store: Store) -> str:
    place = source.partition("@sha256:")[0].rstrip("/")
    for name in ("config.json", "model/config.json"):  # of a plain checkpoint, and of an artifact
        text = store.read_uri(f"{place}/{name}")
        if text is not None:
            return text
    raise Refusal(
        f"{source} has no config.json: name the prefix of a Hugging Face checkpoint; of a GGUF file, whose settings are read when it is fetched, name "
        "a local copy"
    )


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the files that the store keeps of a checkpoint, by name in the artifact; weight files that it does not read are left out."""
    folder = checkpoint.folder
    weights = {tensor.file for tensor in checkpoint.tensors.values()}
    files = {path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern) if path.is_file()}
    return {
        f"model/{path.relative_to(folder).as_posix()}": path
        for path in sorted(files)
        if path.suffix != ".safetensors" or path in weights
    }


def _s3(source: str, store: Store) -> Resolved:
    """Resolve an S3 prefix. Its revision is the digest of its listing (names, sizes, ETags), because S3 has none of its own."""
    listing = store.listing(source)
    revision = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return Resolved(source, revision, lambda folder: store.fetch(source, folder))


def _registered(source: str, store: Store) -> Resolved:
    version = _registered_version(source)
    found = _s3(version.source, store)
    return Resolved(f"models:/{version.name}/{version.version}", found.revision, found.fetch)


def _registered_version(source: str) -> Version:
    from components.lib.tracking import registry

    name, _, alias = source.removeprefix("models:/").partition("@")
    if alias:
        version = registry.aliased(name, alias)
        if version is None:
            raise Refusal(
                f"the registered model {name!r} has no alias {alias!r}: set it, or name a version (models:/{name}/1)"
            )
    else:
        name, _, number = name.rpartition("/")
        if not name or not number.isdigit():
            raise Refusal(f"{source} names no registered version: write models:/name@alias or models:/name/1")
        version = registry.version_of(name, number)
    if not version.source.startswith("s3://"):
        raise Refusal(
            f"{source} lies at {version.source}, not on S3: register its s3:// prefix, or name the folder itself"
        )
    return version


def _hub_model(source: str) -> Resolved:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    named, _, revision = source.partition("@")
    repository, file = gguf_on_hub(named) or (named, None)
    commit = str(ask_hub(lambda: HfApi().model_info(repository, revision=revision or None).sha, source, "release"))

    def fetch(folder: Path) -> Path:
        """Download the checkpoint's files."""
        if file:
            ask_hub(
                lambda: snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=[file, *_CARD]),
                source,
                "release",
            )
            return _of_gguf(folder, file)
        # Fetch the configuration first: an unknown family is refused before gigabytes are downloaded.
        config = ask_hub(
            lambda: hf_hub_download(repository, "config.json", revision=commit, local_dir=folder), source, "release"
        )
        checked(full_precision(json.loads(Path(config).read_text())))
        ask_hub(
            lambda: snapshot_download(
                repository,
                revision=commit,
                local_dir=folder,
                allow_patterns=list(CHECKPOINT_FILES),
                ignore_patterns=list(_OTHER_WEIGHTS),
            ),
            source,
            "release",
        )
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        return folder

    return Resolved(named, commit, fetch)


def gguf_on_hub(name: str) -> tuple[str, str] | None:
    """Return the repository and the file in it if a name is that of a GGUF file of the Hub.

    >>> gguf_on_hub("owner/name/Q8_0/model.gguf"), gguf_on_hub("owner/name")
    (('owner/name', 'Q8_0/model.gguf'), None)
    """
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+\.gguf)", name)
    return (found[1], found[2]) if found else None


def _of_gguf(folder: Path, file: str) -> Path:
    """Return the folder after the file, wherever it lies in the repository, was moved to its top."""
    if not (folder / file).is_file():
        raise Refusal(f"the Hub's repository has no file {file}: check its path")
    (folder / file).rename(folder / Path(file).name)
    return folder


def data_set_commit(name: str, revision: str | None) -> str:
    """Return the commit of a Hub data set's revision, the newest if it is None."""
    from huggingface_hub import HfApi

    return str(ask_hub(lambda: HfApi().dataset_info(name, revision=revision).sha, name, "data set"))


def _hub_text(name: str, text: Text) -> Resolved:
    commit = data_set_commit(name, text.revision)

    def fetch(folder: Path) -> Path:
        """Download the data set, and keep its column of text."""
        from datasets import load_dataset

        data = ask_hub(lambda: load_dataset(name, text.config, split=text.split, revision=commit), name, "data set")
        if text.field not in data.column_names:
            raise Refusal(
                f"the data set {name} has no column {text.field!r}: set field to one of {', '.join(data.column_names)}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        data.select_columns([text.field]).to_parquet(str(folder / "text.parquet"))
        return folder

    source = "/".join(part for part in (name, text.config, text.split, text.field) if part)
    return Resolved(source, commit, fetch)


def ask_hub(question: Callable[[], T], name: str, kind: str) -> T:
    """Return the Hub's answer; turn its errors into refusals of one sentence."""
    import httpx2
    from huggingface_hub import errors

    try:
        return question()
    except errors.HFValidationError:
        raise Refusal(
            f"the {kind} {name!r} is neither a folder here nor a Hub id: check the path, or write owner/name"
        ) from None
    except errors.GatedRepoError:
        raise Unavailable(f"the {kind} {name} is gated: accept its terms on the Hub and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise Refusal(f"the {kind} {name} has no such revision: name a branch, a tag or a commit it has") from None
    except errors.RepositoryNotFoundError:
        raise Unavailable(
            f"the Hub has no {kind} {name}: check the spelling, or set HF_TOKEN if it is private"
        ) from None
    except errors.EntryNotFoundError as error:
        cure = "name a Hugging Face checkpoint, or a GGUF file in it as owner/name/FILE.gguf"
        raise Refusal(
            f"the {kind} {name} lacks a file that is needed ({' '.join(str(error).split())[:200]}): "
            f"{cure if kind == 'release' else 'name another one'}"
        ) from None
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise Unavailable(
            f"the Hub did not answer for the {kind} {name} ({type(error).__name__}): check the connection, or name a folder or file"
        ) from None
