"""Content-addressed artifacts on S3.

An artifact is a prefix. Its manifest (names, sizes, sha256) is written after its files, so an artifact with a manifest is
complete. Files are transferred directly between S3 and the stage: in parallel, in parts, never a whole file in memory.

    store = Store.from_environment()
    reference = store.put_content(Path("model"), "release")
    store.get(reference, Path("copy"))
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any

from botocore.exceptions import ClientError
from pydantic import ValidationError

from components.lib.errors import Refusal, Unavailable
from components.lib.settings import StoreSettings
from components.lib.store.artifacts import (
    MANIFEST,
    File,
    Manifest,
    Reference,
    describe,
    filled_at_once,
    inside,
    need_space,
)
from components.lib.store.s3 import HASTY, PART, PATIENT, UNFINISHED, client, explained, is_missing, split, transfers

_SENDINGS = 6
"""So often files are sent, or found whole, before S3 counts as one that keeps nothing."""
_READINGS = 3
"""So often a file is read before it counts as damaged in S3, not on its way."""
_LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, which that library limits too."""
_LOOKING = 8
"""Requests at once that ask for the presence of files."""

__all__ = ["Manifest", "PrefixCheckpoints", "Reference", "Store", "need_space"]


class Store:
    """Artifacts below one bucket, or one prefix of it."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        """Name the bucket and prefix. boto3 finds endpoint, region and credentials in the environment or the role."""
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self._client = client(PATIENT)

    @classmethod
    def from_environment(cls) -> Store:
        """Open the store that ESPALIER_BUCKET (`bucket` or `bucket/prefix`) names. Raises Refusal if it is not set."""
        place = (StoreSettings().bucket or "").removeprefix("s3://").strip("/")
        if not place:
            raise Refusal("ESPALIER_BUCKET is not set: set it to a bucket, or to bucket/prefix")
        bucket, _, prefix = place.partition("/")
        return cls(bucket, prefix)

    def uri(self, name: str = "") -> str:
        """Return `s3://bucket/prefix/name`."""
        return "/".join(part for part in (f"s3://{self.bucket}", self.prefix, name.strip("/")) if part)

    def check(self) -> None:
        """Check within seconds that the bucket can be written to; make it if it is missing and making it is allowed.

        Raises:
            Refusal: S3 cannot be reached, does not know the credentials, or does not allow a needed operation.
        """
        probe = client(HASTY)
        with explained(f"the bucket {self.bucket!r} at {probe.meta.endpoint_url}"):
            try:
                self._answer(probe)
            except ClientError as error:
                if error.response["Error"]["Code"] != "NoSuchBucket":
                    raise
                _make_bucket(probe, self.bucket)
            _, key = split(self.uri("writable"))
            probe.put_object(Bucket=self.bucket, Key=key, Body=b"")
            # Deleting needs a separate permission, which only the removal of old checkpoints uses.
            with contextlib.suppress(ClientError):
                probe.delete_object(Bucket=self.bucket, Key=key)

    # Artifacts

    def put(
        self, folder: Path, prefix: str, metadata: Mapping[str, Any] | None = None, sent: Sequence[File] = ()
    ) -> Reference:
        """Upload the folder's files, then the manifest, and return the reference.

        The prefix is a key of the content, so a complete artifact that is there already is returned. After an interrupted upload
        the files that arrived are not sent again.

        Args:
            folder: the files.
            prefix: their place.
            metadata: of the manifest.
            sent: files that `send` uploaded there before, and that are not in the folder.

        Raises:
            Refusal: the folder holds no file, or S3 does not take them.
        """
        found = self.find(prefix)
        if found:
            return found
        manifest = Manifest.of(folder, metadata)
        return self._upload(folder, prefix, manifest.model_copy(update={"files": (*manifest.files, *sent)}))

    def send(self, folder: Path, prefix: str, name: str) -> File:
        """Upload one file of the folder below `prefix`, and return its description for `put`.

        Raises:
            Unavailable: S3 does not keep it.
        """
        file = describe(folder / name, name)
        uri = self.uri(prefix)
        for _ in range(_SENDINGS):
            if self._has(uri, file):
                return file
            self._send(folder, uri, [file])
        raise Unavailable(f"S3 takes {uri}/{name} and does not keep it: check the server, and start again")

    def put_content(self, folder: Path, kind: str, metadata: Mapping[str, Any] | None = None) -> Reference:
        """Put the folder at `kind/<its digest>`: the same content is uploaded once."""
        manifest = Manifest.of(folder, metadata)
        prefix = f"{kind}/{manifest.digest}"
        return self.find(prefix) or self._upload(folder, prefix, manifest)

    def _upload(self, folder: Path, prefix: str, manifest: Manifest) -> Reference:
        """Send files until S3 has all of them, then the manifest, and return the reference when S3 has that too.

        Another run that works for the same key may write at the same time. Whichever looks last sees a whole artifact: its own, or
        the other's.
        """
        uri = self.uri(prefix)
        for _ in range(_SENDINGS):
            left = self._absent(uri, manifest.files)
            if left:
                lost = next((file.name for file in left if not (folder / file.name).exists()), None)
                if lost:
                    raise Unavailable(f"S3 lost {uri}/{lost}, which it had taken: check the server, and start again")
                self._send(folder, uri, left)
                continue
            self._write(f"{uri}/{MANIFEST}", manifest.sealed())
            written = self._manifest_at(uri)
            if written and self._keeps(uri, written, manifest):
                return Reference(uri, written.digest)
        raise Unavailable(f"S3 takes the files of {uri} and does not keep them: check the server, and start again")

    def _keeps(self, uri: str, written: Manifest, ours: Manifest) -> bool:
        """Return whether the files of the manifest that was read back are there: garbage collection may delete old ones meanwhile."""
        if written.digest != ours.digest:
            return not self._absent(uri, written.files)
        sizes = self._sizes(uri)
        return all(sizes.get(file.name) == file.size for file in ours.files)

    def _send(self, folder: Path, uri: str, files: Iterable[File]) -> None:
        with transfers(self._client) as transfer:
            for file in files:
                # Store the hash with the object, so that a resumed upload knows which files arrived.
                transfer.upload(folder / file.name, *split(f"{uri}/{file.name}"), {"sha256": file.sha256})

    def _absent(self, uri: str, files: Sequence[File]) -> list[File]:
        """Return the files that are not below `uri`, or have another size or hash there."""
        sizes = self._sizes(uri)
        listed = [file for file in files if sizes.get(file.name) == file.size]
        with ThreadPoolExecutor(_LOOKING) as threads:
            there = dict(zip(listed, threads.map(lambda file: self._has(uri, file), listed), strict=True))
        return [file for file in files if not there.get(file)]

    def _sizes(self, uri: str) -> dict[str, int]:
        """Return the bytes of each object below `uri`."""
        start = split(f"{uri}/")[1]
        return {one["Key"].removeprefix(start): one["Size"] for one in self._list(f"{uri}/")}

    def _has(self, uri: str, file: File) -> bool:
        bucket, key = split(f"{uri}/{file.name}")
        with explained(f"{uri}/{file.name}"):
            try:
                head = self._client.head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if is_missing(error):
                    return False
                raise
        return head["ContentLength"] == file.size and file.sha256 in head["Metadata"].values()

    def find(self, prefix: str) -> Reference | None:
        """Return the reference of the artifact at `prefix`, or None if none is complete."""
        manifest = self.manifest_of(prefix)
        return None if manifest is None else Reference(self.uri(prefix), manifest.digest)

    def manifest_of(self, prefix: str) -> Manifest | None:
        """Return the manifest of the artifact at `prefix`, or None if none is complete."""
        return self._manifest_at(self.uri(prefix))

    def manifest(self, reference: Reference) -> Manifest:
        """Return the manifest. Raises Refusal if it is missing or has another digest than the reference."""
        manifest = self._manifest_at(reference.uri)
        if manifest is None:
            raise Unavailable(
                f"{reference.uri} has no {MANIFEST}, so it is not complete: run the stage that makes it again"
            )
        if manifest.digest != reference.digest:
            raise Unavailable(
                f"{reference.uri} has the digest {manifest.digest[:12]}, not {reference.digest[:12]} as its reference says: "
                "it was changed since, so run the stage that makes it again"
            )
        return manifest

    def _manifest_at(self, uri: str) -> Manifest | None:
        """Return the manifest, or None if there is none; one that was damaged on its way is read again."""
        for left in reversed(range(_READINGS)):
            text = self._read(f"{uri}/{MANIFEST}")
            try:
                return None if text is None else Manifest.opened(text)
            except ValueError as error:
                if not left:
                    said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                    raise Unavailable(
                        f"{uri}/{MANIFEST} is no manifest of an artifact ({said}): "
                        "delete it, and run the stage that makes it again"
                    ) from None
        return None

    def get(self, reference: Reference, folder: Path, names: Iterable[str] | None = None) -> Path:
        """Download the artifact, or the files and folders of it in `names`, and return `folder`, filled atomically.

        Raises:
            Refusal: a file is missing or differs from its digest, the disk is too small, or `folder` is not empty.
        """
        manifest = self.manifest(reference)
        wanted = manifest if names is None else manifest.only(names)
        need_space(folder, wanted.size)
        with filled_at_once(folder) as fresh:
            self._fetch(reference.uri, wanted.files, fresh)
        return folder

    def _fetch(self, uri: str, files: Sequence[File], folder: Path) -> None:
        """Download files and compare them with their digests; those that were damaged on their way are fetched again."""
        left = list(files)
        for _ in range(_READINGS):
            with transfers(self._client) as transfer:
                for file in left:
                    transfer.download(*split(f"{uri}/{file.name}"), inside(folder, file.name))
            left = [file for file in left if describe(folder / file.name, file.name) != file]
            if not left:
                return
        for file in left:
            _same(describe(folder / file.name, file.name), file, uri)

    def get_headers(self, reference: Reference, folder: Path, names: Iterable[str] | None = None) -> Path:
        """Download the artifact's JSON files, or the files in `names`, of safetensors files the headers; return `folder`.

        A safetensors file gets its full length but not its tensors: enough to open a checkpoint, for a download of kilobytes.
        A header has no digest, so it is read until two readings agree.

        Raises:
            Refusal: a file is missing or differs from its digest, or `folder` is not empty.
        """
        wanted = None if names is None else set(names)
        files = self.manifest(reference).files
        chosen = [file for file in files if wanted is None or file.name in wanted]
        heads = [file for file in chosen if file.name.endswith(".safetensors")]
        whole = [file for file in chosen if file not in heads and (wanted is not None or file.name.endswith(".json"))]
        with filled_at_once(folder) as fresh:
            self._fetch(reference.uri, whole, fresh)
            for file in heads:
                path = inside(fresh, file.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self._header(f"{reference.uri}/{file.name}", file.size))
                os.truncate(path, file.size)
        return folder

    def _header(self, uri: str, size: int) -> bytes:
        """Return the header of a safetensors file of `size` bytes, with its length before it."""
        seen: set[bytes] = set()
        for _ in range(2 * _READINGS):
            length = int.from_bytes(self.range_of(uri, 0, 8), "little")
            header = self.range_of(uri, 0, min(8 + min(length, _LONGEST_HEADER), size))
            if header in seen:
                return header
            seen.add(header)
        raise Unavailable(f"{uri} reads differently each time: check the network and the server, and start again")

    def verify(self, reference: Reference) -> None:
        """Stream and hash every file, in the order of their names. Raises Refusal that names the first file that is missing or differs."""
        for file in sorted(self.manifest(reference).files, key=lambda file: file.name):
            _same(self._described(reference.uri, file.name), file, reference.uri)

    def _described(self, uri: str, name: str) -> File:
        """Read an object part by part, and return its size and sha256."""
        bucket, key = split(f"{uri}/{name}")
        with explained(f"s3://{bucket}/{key}"):
            size = self._client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        # A concurrent download into something that cannot seek blocks for ever when it is ten parts ahead.
        sha256 = hashlib.sha256()
        for start in range(0, size, PART):
            sha256.update(self.range_of(f"{uri}/{name}", start, min(start + PART, size)))
        return File(name=name, size=size, sha256=sha256.hexdigest())

    def strangers(self, reference: Reference) -> list[str]:
        """Return the names of the objects below the artifact's prefix that its manifest does not name."""
        known = {file.name for file in self.manifest(reference).files} | {MANIFEST}
        start = split(f"{reference.uri}/")[1]
        names = (found["Key"].removeprefix(start) for found in self._list(f"{reference.uri}/"))
        return sorted(name for name in names if name not in known)

    def attach(self, reference: Reference, name: str, text: str) -> None:
        """Put a small file beside the artifact's files, such as their signature. Its manifest and digest do not have it."""
        self._write(f"{reference.uri}/{name}", text)

    def attached(self, reference: Reference, name: str) -> str | None:
        """Return the text of a file that `attach` put there, or None."""
        return self._read(f"{reference.uri}/{name}")

    def delete(self, prefix: str) -> None:
        """Delete everything below `prefix`, the manifest first, so that a partly deleted artifact does not count as complete.

        Repeat until nothing is listed: `put` may write a manifest meanwhile for files that it saw before they were deleted. As `put`
        looks for the files after its manifest, whichever of the two is last leaves a whole artifact, or none.
        """
        if not prefix.strip("/"):
            raise ValueError("an empty prefix would delete the whole store")
        uri = self.uri(prefix)
        start = split(f"{uri}/")[1]
        for _ in range(_SENDINGS):
            self._delete(f"{start}{MANIFEST}")
            keys = [found["Key"] for found in self._list(f"{uri}/")]
            if not keys:
                return
            with ThreadPoolExecutor(_LOOKING) as threads:
                list(threads.map(self._delete, keys))
        raise Unavailable(f"S3 does not delete {uri}, or it is written at the same time: try again later")

    def _delete(self, key: str) -> None:
        with explained(f"s3://{self.bucket}/{key}"):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders right below `prefix` that hold anything, complete or not."""
        uri = f"{self.uri(prefix)}/"
        start = len(split(uri)[1])
        pages = self._pages(uri, Delimiter="/")
        return [found["Prefix"][start:-1] for page in pages for found in page.get("CommonPrefixes", ())]

    def newest(self, prefix: str) -> list[str]:
        """Return the prefixes of the complete artifacts right below `prefix`, the newest first."""
        uri = f"{self.uri(prefix)}/"
        start = split(uri)[1]
        found = [one for one in self._list(uri) if one["Key"][len(start) :].count("/") == 1]
        whole = [one for one in found if one["Key"].endswith(f"/{MANIFEST}")]
        whole.sort(key=lambda one: one["LastModified"], reverse=True)
        return [f"{prefix}/{one['Key'][len(start) :].partition('/')[0]}" for one in whole]

    def objects(self, prefix: str) -> list[tuple[str, int, datetime]]:
        """Return name in the store, bytes and time of the last change, by S3's clock, of every object below `prefix`."""
        start = len(split(f"{self.uri()}/")[1])
        found = self._list(f"{self.uri(prefix)}/")
        return [(one["Key"][start:], one["Size"], one["LastModified"]) for one in found]

    def clock(self) -> datetime:
        """Return the time by S3's clock."""
        with explained(self.uri()):
            answer = self._answer(self._client)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])

    def _answer(self, s3: Any) -> dict[str, Any]:
        """List next to nothing: a server may walk through everything below the prefix, even if one object is asked for."""
        return s3.list_objects_v2(Bucket=self.bucket, Prefix=split(self.uri("writable"))[1], MaxKeys=1)

    # Small texts that change, such as runs/<run>/report.json

    def write_text(self, name: str, text: str) -> None:
        """Write one small object; replace it if it exists."""
        self._write(self.uri(name), text)

    def read_text(self, name: str) -> str | None:
        """Return the text of one small object, or None if there is none."""
        return self._read(self.uri(name))

    def texts(self, prefix: str) -> dict[str, datetime]:
        """Return the names of the small objects right below `prefix`, and the time of the last change of each by S3's clock."""
        uri = f"{self.uri(prefix)}/"
        found = ((one["Key"].removeprefix(split(uri)[1]), one["LastModified"]) for one in self._list(uri))
        return {name: modified for name, modified in found if "/" not in name}

    def delete_text(self, name: str) -> None:
        """Delete one small object; a missing one is no error."""
        self._delete(split(self.uri(name))[1])

    # Objects that other programs put on S3

    def fetch(self, uri: str, folder: Path) -> Path:
        """Download an object, or everything below a prefix, that has no manifest; return `folder`, filled atomically.

        Raises:
            Refusal: nothing is there, or it cannot be read.
        """
        bucket, key = split(uri)
        objects = self._objects(uri)
        need_space(folder, sum(found["Size"] for found in objects))
        with filled_at_once(folder) as fresh, transfers(self._client) as transfer:
            for found in objects:
                below = found["Key"].removeprefix(key.rstrip("/")).lstrip("/")
                transfer.download(bucket, found["Key"], inside(fresh, below or PurePosixPath(key).name))
        return folder

    def listing(self, uri: str) -> list[tuple[str, int, str]]:
        """Return key, bytes and ETag (the second of the last change if S3 gives none) of each object that `fetch` would download."""
        return [(found["Key"], found["Size"], _etag(found)) for found in self._objects(uri)]

    def _objects(self, uri: str) -> list[dict[str, Any]]:
        """List the object at `uri`, or those below it as a folder. Raises Refusal if there is neither."""
        key = split(uri)[1].rstrip("/")
        found = [
            one
            for one in self._list(uri.rstrip("/"))
            if one["Key"] == key or one["Key"].startswith(f"{key}/" if key else "")
        ]
        if not found:
            raise Unavailable(f"{uri} names no object and no prefix with objects: check the address")
        return found

    def range_of(self, uri: str, start: int, end: int, etag: str | None = None) -> bytes:
        """Return the bytes of an object anywhere on S3 from `start` to before `end`.

        Raises:
            Unavailable: it cannot be read, or is no longer the object that `listing` gave this ETag.
        """
        bucket, key = split(uri)
        if start >= end:
            return b""
        for left in reversed(range(_READINGS)):
            with explained(uri):
                try:
                    answer = self._client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
                    content = answer["Body"].read()
                except UNFINISHED:
                    if not left:
                        raise
                    continue
            if etag not in {None, _etag(answer)}:
                raise Unavailable(f"{uri} was changed after it was listed: start a new run")
            return content
        raise AssertionError("the last reading returns or raises")

    def read_uri(self, uri: str) -> str | None:
        """Return the text of one small object anywhere on S3, or None if there is none."""
        return self._read(uri)

    # S3 itself

    def _list(self, uri: str) -> list[dict[str, Any]]:
        """List every object whose URI starts with `uri`; the markers of empty folders are left out."""
        found = (one for page in self._pages(uri) for one in page.get("Contents", ()))
        return [one for one in found if not one["Key"].endswith("/")]

    def _pages(self, uri: str, **options: str) -> list[dict[str, Any]]:
        """Return the answers to a listing; one that was damaged on its way, so that botocore cannot parse it, is asked for again."""
        bucket, key = split(uri)
        paginator = self._client.get_paginator("list_objects_v2")
        for _ in range(_READINGS):
            with explained(uri), contextlib.suppress(ValueError):
                return list(paginator.paginate(Bucket=bucket, Prefix=key, **options))
        raise Unavailable(f"S3 lists {uri} in a way that cannot be read: check the server, and start again")

    def _write(self, uri: str, text: str) -> None:
        bucket, key = split(uri)
        with explained(uri):
            self._client.put_object(Bucket=bucket, Key=key, Body=text.encode())

    def _read(self, uri: str) -> str | None:
        bucket, key = split(uri)
        buffer = io.BytesIO()
        with explained(uri):
            try:
                # Unlike get_object, it retries if the connection drops in the body.
                self._client.download_fileobj(bucket, key, buffer)
            except ClientError as error:
                if is_missing(error):
                    return None
                raise
        try:
            return buffer.getvalue().decode()
        except UnicodeDecodeError:
            raise Unavailable(
                f"{uri} is no text: it was damaged, so start again, and delete it if this is said again"
            ) from None


class PrefixCheckpoints:
    """A training stage's checkpoints, at `<prefix>/step-000123`: the newest complete one is kept.

    It is the `components.lib.training.journal.Checkpoints` of a stage that runs against a store.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        """Keep checkpoints below `prefix`, such as `checkpoints/<key>`."""
        self._store = store
        self._prefix = prefix

    def save(self, folder: Path, step: int) -> None:
        """Upload the folder as the checkpoint of `step`; then delete the older ones."""
        self._store.put(folder, self._at(step), {"step": step})
        for older in self._steps():
            if older < step:
                self._store.delete(self._at(older))

    def latest(self, folder: Path) -> int | None:
        """Download the newest complete checkpoint into `folder`, which is empty or missing, and return its step.

        Raises:
            Refusal: it is damaged.
        """
        for step in self._steps():
            if reference := self._store.find(self._at(step)):
                self._store.get(reference, folder)
                return step
        return None

    def _at(self, step: int) -> str:
        return f"{self._prefix}/step-{step:06d}"

    def _steps(self) -> list[int]:
        """Return the steps of which any file is there, newest first."""
        found = (re.fullmatch(r"step-(\d+)", name) for name in self._store.folders(self._prefix))
        return sorted((int(match[1]) for match in found if match), reverse=True)


def _etag(found: Mapping[str, Any]) -> str:
    """Return the ETag in an answer about an object; rclone's server gives none, and a header of HTTP counts whole seconds."""
    return found.get("ETag", "").strip('"') or found["LastModified"].astimezone(UTC).isoformat(timespec="seconds")


def _make_bucket(probe: Any, bucket: str) -> None:
    region = probe.meta.region_name
    if region in {None, "us-east-1", "aws-global"}:
        probe.create_bucket(Bucket=bucket)
    else:
        probe.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": region})


def _same(found: File, expected: File, uri: str) -> None:
    """Raise Refusal if a file differs from its entry in the manifest."""
    if found.size != expected.size:
        raise Unavailable(
            f"{uri}/{expected.name} has {found.size} bytes, not {expected.size} as its manifest says: "
            f"it is damaged, so delete {uri} and run the stage that makes it again"
        )
    if found.sha256 != expected.sha256:
        raise Unavailable(
            f"{uri}/{expected.name} has the sha256 {found.sha256[:12]}, not {expected.sha256[:12]} as its manifest says: "
            f"it is damaged, so delete {uri} and run the stage that makes it again"
        )
