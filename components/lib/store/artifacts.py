"""Artifacts: a folder of files, the manifest that completes it, and the reference that names it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from components.lib.errors import Refusal, Unavailable

MANIFEST = "manifest.json"
"""Name of the manifest beside the files. It is written last, so its presence proves that the files are there."""


@dataclass(frozen=True)
class Reference:
    """A reference to an artifact, which stages pass instead of files, as one string: `s3://bucket/prefix@sha256:<64 hex digits>`."""

    uri: str
    digest: str
    """The manifest's digest, 64 hex digits."""

    def __str__(self) -> str:
        return f"{self.uri}@sha256:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse the string form. Raises Refusal if the text is no reference."""
        match = re.fullmatch(r"(s3://[^/\s]+/\S+)@sha256:([0-9a-f]{64})", text)
        if not match:
            raise Refusal(f"{text!r} is no reference to an artifact: write s3://bucket/prefix@sha256:<64 hex digits>")
        return cls(*match.groups())


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in {"", ".", MANIFEST} or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file inside the artifact")
    return name


class File(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(_inside)]
    """The path below the artifact's folder, with `/` between its parts."""
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The files of an artifact, and its metadata."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: tuple[File, ...]
    metadata: dict[str, Any] = {}

    @property
    def digest(self) -> str:
        """sha256 over the files, sorted by name, as canonical JSON. The metadata is not included: it may hold a time."""
        files = [file.model_dump() for file in sorted(self.files, key=lambda file: file.name)]
        return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @classmethod
    def of(cls, folder: Path, metadata: Mapping[str, Any] | None = None) -> Manifest:
        """Hash every file below `folder`, links followed. Raises Refusal if there is none, or one with the manifest's name."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            raise Refusal(f"the folder {folder} holds no file, so there is nothing to store: fill it first")
        if folder / MANIFEST in paths:
            raise Refusal(f"the folder {folder} has a file {MANIFEST}, a name that the store reserves: rename it")
        with ThreadPoolExecutor() as threads:
            files = tuple(threads.map(lambda path: describe(path, path.relative_to(folder).as_posix()), paths))
        return cls(files=files, metadata=dict(metadata or {}))

    def sealed(self) -> str:
        """Return the manifest as JSON, with a sha256 of its own by which a reader notices a changed byte."""
        content = self.model_dump(mode="json")
        return json.dumps({**content, "sha256": _seal(content)}, indent=2)

    @classmethod
    def opened(cls, text: str) -> Manifest:
        """Parse what `sealed` returned; a manifest of an earlier version has no seal. Raises ValueError if it was changed."""
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
        seal = content.pop("sha256", None)
        if seal not in {None, _seal(content)}:
            raise ValueError("its content does not match its sha256")
        return cls.model_validate(content)

    def only(self, names: Iterable[str]) -> Manifest:
        """Return the manifest of the named files and folders, such as `model`. Raises Refusal if a name is not in the artifact."""
        chosen: dict[str, File] = {}
        for name in names:
            found = {file.name: file for file in self.files if file.name == name or file.name.startswith(f"{name}/")}
            if not found:
                raise Refusal(
                    f"the artifact has no file {name!r}: it has {', '.join(file.name for file in self.files)}"
                )
            chosen |= found
        return self.model_copy(update={"files": tuple(chosen.values())})


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe(path: Path, name: str) -> File:
    """Return size and sha256 of the file at `path`, under `name`."""
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return File(name=name, size=stream.tell(), sha256=sha256)


def need_space(folder: Path, size: int) -> None:
    """Raise Unavailable if the disk of `folder` (which need not exist yet) has less than `size` bytes free."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise Unavailable(
            f"{folder} needs {size / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free: make room, or use another folder"
        )


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`. Raises Refusal if that is outside the folder, as for a key with `..`."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise Refusal(f"the object {name!r} would be written outside {folder}: rename it")
    return path


@contextlib.contextmanager
def filled_at_once(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill; rename it to `folder` at the end, or remove it after an error.

    Raises:
        Refusal: `folder` is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"{folder} is not an empty folder: empty it, or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
