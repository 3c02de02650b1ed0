"""Texts that are too large to copy: parquet files that are read where they lie, on S3 or on the Hub.

A text in the store is then a list of these files, `shards.json`, with what tells that a file is still the same: its ETag on S3, the
commit in its address on the Hub.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow.parquet import ParquetFile
from pydantic import BaseModel, ConfigDict, ValidationError

from components.lib.errors import Refusal
from components.lib.recipe.schema import Corpus
from components.lib.sources.resolve import ask_hub, data_set_commit
from components.lib.store.s3 import split
from components.lib.store.store import Store
from components.lib.transformer.text import require_column, require_text

SHARDS = "shards.json"
"""The one file of a text that is read where it lies."""
_BUFFER = 4 << 20
"""Bytes of one request."""
_ROWS = 64
"""Rows decoded at once."""


class Shard(BaseModel):
    """A parquet file of a text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    """`s3://bucket/key`, or `hf://datasets/owner/name@commit/path`."""
    size: int
    """Bytes."""
    etag: str = ""
    """S3's, which changes with the content; empty on the Hub, where the commit is in the address."""


class Shards(BaseModel):
    """The files of a text, and the column that holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    field: str
    files: tuple[Shard, ...]

    @classmethod
    def load(cls, path: Path) -> Shards:
        """Read what `pin` wrote. Raises Refusal if it is something else."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise Refusal(
                f"the text {path} is no list of parquet files ({error.errors()[0]['msg']}): pin it again"
            ) from None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def list_shards(text: Corpus, store: Store) -> Shards:
    """List the parquet files of an S3 folder or a Hub data set, in the order of their names.

    Raises:
        Refusal: there is none, or the folder holds other files than parquet.
    """
    files = _on_hub(text) if text.hub else _on_s3(text.path or "", store)
    return Shards(field=text.field, files=tuple(files))


def _on_s3(folder: str, store: Store) -> list[Shard]:
    bucket = split(folder)[0]
    listed = store.listing(folder)
    shards = [
        Shard(uri=f"s3://{bucket}/{key}", size=size, etag=etag)
        for key, size, etag in listed
        if key.endswith(".parquet")
    ]
    if not shards:
        raise Refusal(
            f"{folder} holds no .parquet file, and stream is true: write the text as parquet, or name one file and set stream to false"
        )
    return shards


def _on_hub(text: Corpus) -> list[Shard]:
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem

    name = text.hub or ""
    commit = data_set_commit(name, text.revision)
    builder = ask_hub(lambda: load_dataset_builder(name, text.config, revision=commit), name, "data set")
    found = (builder.config.data_files or {}).get(text.split) or []
    if not found or not all(str(file).endswith(".parquet") for file in found):
        raise Refusal(
            f"the data set {name} keeps the split {text.split!r} in no parquet files, and stream is true: "
            "set revision to refs/convert/parquet, where the Hub keeps a copy of it in parquet, or set stream to false"
        )
    system = HfFileSystem()
    return [Shard(uri=str(file), size=int(system.info(str(file))["size"])) for file in found]


def row_groups(shards: Shards, store: Store, seed: int) -> Iterator[Iterator[str]]:
    """Yield the documents of every row group of every file, in an order that the seed decides.

    The first row group of each file comes before the second of any, so that few windows are of many files. A row group is read when
    its documents are asked for, some rows at once.
    """
    generator = random.Random(seed)
    files = list(shards.files)
    generator.shuffle(files)
    left = {file.uri: -1 for file in files}  # not opened yet
    orders = {file.uri: generator.randrange(1 << 32) for file in files}
    number = 0
    while files:
        for file in list(files):
            if left[file.uri] < 0:
                with _opened(file, shards.field, store) as parquet:
                    left[file.uri] = parquet.num_row_groups
            if number >= left[file.uri]:
                files.remove(file)
                continue
            groups = list(range(left[file.uri]))
            random.Random(orders[file.uri]).shuffle(groups)
            yield _documents(file, groups[number], shards.field, store)
        number += 1


def _documents(file: Shard, group: int, field: str, store: Store) -> Iterator[str]:
    with _opened(file, field, store) as parquet:
        for batch in parquet.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[field]):
            for number, value in enumerate(batch.column(0).to_pylist(), 1):
                yield require_text(file.uri, number, field, value)


@contextmanager
def _opened(file: Shard, field: str, store: Store) -> Iterator[ParquetFile]:
    """Open a file without fetching it. Raises Refusal if it is no parquet file, has no such column, or changed since it was listed."""
    try:
        with _stream(file, store) as stream:
            parquet = ParquetFile(stream, buffer_size=_BUFFER)
            require_column(file.uri, field, parquet.schema_arrow.names)
            yield parquet
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise Refusal(f"the text {file.uri} cannot be read as parquet ({reason}): write the file anew") from None


def _stream(file: Shard, store: Store) -> Any:
    if file.uri.startswith("s3://"):
        read = partial(store.range_of, file.uri, etag=file.etag)
        return io.BufferedReader(Ranges(read, file.size), _BUFFER)
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(file.uri, "rb", block_size=_BUFFER)


class Ranges(io.RawIOBase):
    """A file whose bytes are asked for when they are read."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        """Take the function that returns the bytes from a position to before another, and the number of all."""
        super().__init__()
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, and return it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the file reaches, and return how many bytes that were."""
        end = min(self._position + len(buffer), self._size)
        content = self._read(self._position, end) if end > self._position else b""
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
