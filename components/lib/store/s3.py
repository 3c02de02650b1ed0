"""S3 itself: clients, transfers, and its errors as sentences for a user."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.loaders import Loader, create_loader
from botocore.parsers import ResponseParserError
from botocore.utils import conditionally_calculate_md5
from s3transfer.exceptions import RetriesExceededError
from s3transfer.manager import TransferManager

from components.lib.errors import Refusal, Unavailable

UNFINISHED = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
"""Errors of a connection that ends within a body, which botocore does not try again."""
_UNREACHABLE = (
    ConnectionError,
    ConnectionClosedError,
    HTTPClientError,
    ResponseParserError,
    RetriesExceededError,
    *UNFINISHED,
)
_ANONYMOUS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)
_UNKNOWN_KEY = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
}
_FORBIDDEN = {"AccessDenied", "AllAccessDisabled", "403", "Forbidden"}
_DAMAGED_ON_ITS_WAY = {"BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentSHA256Mismatch"}
_FULL = {"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "507"}

_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role"


# Downloads are compared with the sha256 in their manifests, so the server's own checksum adds nothing, and botocore misreads the
# body of an error that comes with one. Uploads carry Content-MD5, which every S3 compares, instead of a CRC, which not every one does.
# That header is signed. The body's sha256 in the signature, which botocore makes without TLS, would be a second hash of the same bytes,
# and rclone does not compare it.
_CHECKSUMS = {
    "response_checksum_validation": "when_required",
    "request_checksum_calculation": "when_required",
    "s3": {"payload_signing_enabled": False},
}

_TRIES = 6
PATIENT = Config(
    **_CHECKSUMS,
    connect_timeout=5,
    read_timeout=60,
    tcp_keepalive=True,
    max_pool_connections=16,
    retries={"mode": "standard", "total_max_attempts": _TRIES},
)
"""For the work: a failed request is retried for about half a minute."""
HASTY = Config(**_CHECKSUMS, connect_timeout=2, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 2})
"""For checking whether S3 answers at all."""

_LONGEST_WAIT = 20.0
"""Seconds to which a server's Retry-After is limited."""
PART = 16 * 2**20
_THREADS = 8


def client(config: Config) -> Any:
    """Open an S3 client; boto3 finds endpoint, region and credentials in the environment, its files or the role."""
    try:
        session = botocore.session.Session()
        session.register_component("data_loader", _descriptions())
        made = boto3.session.Session(botocore_session=session).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise Unavailable(f"S3 cannot be set up ({error}): check the variables that start with AWS_") from None
    for operation in ("PutObject", "UploadPart"):
        made.meta.events.register(f"before-call.s3.{operation}", conditionally_calculate_md5)
    if config is PATIENT:
        made.meta.events.register("needs-retry.s3", _again)
    return made


@cache
def _descriptions() -> Loader:
    """Return the loader of S3's description, which each session would read anew: six times as long as all else that a client needs."""
    return create_loader()


def _again(response: Any, attempts: int, caught_exception: Exception | None, **_: Any) -> float | None:
    """Return the seconds to wait before a request is tried again that botocore itself would give up; None if it is not tried again.

    botocore takes neither 429 nor an upload that was damaged on its way for temporary.
    """
    if attempts >= _TRIES:
        return None
    if response is None:
        return 0.5 if isinstance(caught_exception, ResponseParserError) else None
    http, parsed = response
    if http.status_code == 429:
        asked = http.headers.get("Retry-After", "")
        return min(float(asked) if asked.isdecimal() else 2.0**attempts, _LONGEST_WAIT)
    code = parsed.get("Error", {}).get("Code")
    # s3transfer knows an empty object by this error's code, which is missing if the answer's body was damaged.
    unreadable = http.status_code == 416 and code != "InvalidRange"
    return 0.0 if unreadable or code in _DAMAGED_ON_ITS_WAY else None


def split(uri: str) -> tuple[str, str]:
    """Return the bucket and the key of an `s3://` URI. Raises Refusal if it is none."""
    match = re.fullmatch(r"s3://([^/]+)/?(.*)", uri)
    if not match:
        raise Refusal(f"{uri!r} is no S3 address: write s3://bucket/prefix")
    return match[1], match[2]


class ConcurrentTransfers:
    """Up- and downloads, in parts of 16 MiB, on one pool of threads."""

    def __init__(self, manager: TransferManager) -> None:
        self._manager = manager
        self._begun: list[tuple[str, Any]] = []

    def upload(self, path: Path, bucket: str, key: str, metadata: Mapping[str, str]) -> None:
        """Start to upload a file. Afterwards look whether it is there: a server may lose what it said it took."""
        future = self._manager.upload(str(path), bucket, key, extra_args={"Metadata": dict(metadata)})
        self._begun.append((f"s3://{bucket}/{key}", future))

    def download(self, bucket: str, key: str, path: Path) -> None:
        """Start to download an object, and make the folder of its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._begun.append((f"s3://{bucket}/{key}", self._manager.download(bucket, key, str(path))))

    def finish(self) -> None:
        """Wait for all transfers, and raise the first error."""
        for uri, future in self._begun:
            with explained(uri):
                try:
                    future.result()
                except ClientError as error:
                    # The answer to the request that put the parts together was lost, and its repetition finds no parts.
                    if error.response["Error"]["Code"] != "NoSuchUpload":
                        raise


@contextlib.contextmanager
def transfers(client: Any) -> Iterator[ConcurrentTransfers]:
    """Yield a ConcurrentTransfers and wait for it when the block ends. An error cancels the unfinished transfers."""
    config = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=_THREADS)
    with create_transfer_manager(client, config) as manager:
        begun = ConcurrentTransfers(manager)
        yield begun
        begun.finish()


def is_missing(error: ClientError) -> bool:
    """Return True if the error means that there is no such object, even if its text was damaged on its way."""
    code = error.response["Error"]["Code"]
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return code in {"404", "NoSuchKey"} or (status == 404 and code not in {"NoSuchBucket", "NoSuchUpload"})


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors that a user can correct into an Unavailable that names `what`; raise every other error unchanged."""
    try:
        yield
    except (BotoCoreError, ClientError, RetriesExceededError, OSError) as error:
        sentence = _sentence(what, error)
        if sentence is None:
            raise
        raise Unavailable(sentence) from error


def _sentence(what: str, error: Exception) -> str | None:
    if isinstance(error, ClientError):
        return _answered(what, error)
    if isinstance(error, _ANONYMOUS):
        return f"there are no credentials for {what}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the role access"
    if isinstance(error, _UNREACHABLE):
        said = " ".join(str(error).split())
        return f"{what} cannot be reached ({said}): check AWS_ENDPOINT_URL_S3 and the network"
    if isinstance(error, ParamValidationError):
        return f"S3 cannot be asked for {what}: {error}"
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"the disk is full ({error.filename or 'no space left'}) while moving {what}: make room and start again"
    return None


def _answered(what: str, error: ClientError) -> str | None:
    code = error.response["Error"]["Code"]
    message = error.response["Error"].get("Message", "")
    if code in _UNKNOWN_KEY:
        return f"S3 does not accept the credentials for {what} ({code}): {_CREDENTIALS}"
    if code in _FORBIDDEN:
        return f"the credentials do not allow {error.operation_name} on {what} ({code}): ask for that permission, or name another ESPALIER_BUCKET"
    if code == "NoSuchBucket":
        return f"the bucket of {what} does not exist: make it, or name another"
    if is_missing(error):
        return f"{what} is missing (S3 answered {code} to {error.operation_name}): run the stage that makes it again"
    if code in _FULL or "no space left" in message.lower():
        return f"S3 has no room for {what} ({message or code}): make room there and start again"
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status == 429 or status >= 500 or code in _DAMAGED_ON_ITS_WAY:
        return f"S3 answers {status} ({code}) to {error.operation_name} of {what}, again and again: start again when the server is well"
    if code in {"BucketAlreadyExists", "InvalidBucketName"}:
        return f"{what} cannot be made ({code}): name another bucket in ESPALIER_BUCKET"
    return None
