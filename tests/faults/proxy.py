"""A proxy that breaks requests on a seeded schedule: it stands on loopback between the stages and a real S3 or MLflow server.

    with Proxy("http://127.0.0.1:9000", Schedule(seed=3, rate=0.2)) as proxy:
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.address

Whether and how a request is broken depends on the seed, on its method and path, and on how many requests with both came before it.
So the same seed breaks the same requests in the same way, in whichever order threads send them.
"""

from __future__ import annotations

import hashlib
import http.client
import random
import re
import socket
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

_NAMES_OF_A_RUN = re.compile(r"[0-9a-f]{32}|\d{8}-\d{6}-[0-9a-f]{8}")
"""The parts of a path that differ from run to run: the prefixes of tests, the ids of MLflow, the labels of runs."""
_OF_A_CONNECTION = {"connection", "expect", "keep-alive", "transfer-encoding"}
_PATIENCE = 120.0


class Fault(Enum):
    """What happens to a request."""

    DELAY = "delays the answer"
    ERROR_500 = "answers 500"
    ERROR_503 = "answers 503"
    ERROR_429 = "answers 429 with Retry-After"
    CUT = "cuts the answer's body short"
    FLIP_DOWN = "flips a bit of the answer's body"
    FLIP_UP = "flips a bit of the upload's body"
    DROP_UP = "drops the connection in the upload"
    DROP_DOWN = "drops the connection after the server did the work"
    UNKEPT = "answers an upload with success without keeping it"
    AWAY = "goes away for a while"


S3_FAULTS = tuple(Fault)
MLFLOW_FAULTS = tuple(fault for fault in Fault if fault not in {Fault.UNKEPT, Fault.FLIP_UP, Fault.FLIP_DOWN})
"""MLflow's protocol has no checksums: only TCP and TLS can find a flipped bit."""

_STATUS = {Fault.ERROR_500: 500, Fault.ERROR_503: 503, Fault.ERROR_429: 429}


@dataclass(frozen=True)
class Schedule:
    """Which requests are broken, and how."""

    seed: int
    rate: float = 0.2
    """The share of requests that are broken."""
    faults: Sequence[Fault] = S3_FAULTS
    delay: float = 0.3
    """Seconds that a delay takes at most."""
    away: float = 2.0
    """Seconds that the server is away at most."""

    def draw(self, request: str, occurrence: int) -> tuple[Fault | None, random.Random]:
        """Return what happens to the nth occurrence of a request (`PUT /bucket/key`), and the dice for its details."""
        dice = random.Random(f"{self.seed} {request} {occurrence}")
        return (dice.choice(self.faults) if dice.random() < self.rate else None), dice


@dataclass
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Proxy:
    """The proxy, while its block runs."""

    upstream: str
    """The server's address, such as `http://127.0.0.1:9000`."""
    schedule: Schedule
    broken: list[tuple[Fault, str]] = field(default_factory=list)
    """The faults so far, each with the request that it broke."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._away_until = 0.0

    @property
    def address(self) -> str:
        """The address to name instead of the server's."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = _PATIENCE

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client closed, or a fault did
                    self.close_connection = True

            def log_message(self, format: str, *arguments: object) -> None:
                """Print nothing."""

            def _any(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = do_OPTIONS = _any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _next(self, request: str) -> tuple[Fault | None, random.Random]:
        with self._lock:
            if time.monotonic() < self._away_until:
                return Fault.AWAY, random.Random()
            self._seen[request] += 1
            fault, dice = self.schedule.draw(request, self._seen[request])
            if fault:
                self.broken.append((fault, request))
            if fault is Fault.AWAY:
                self._away_until = time.monotonic() + dice.uniform(0.2, 1) * self.schedule.away
            return fault, dice

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        path = urllib.parse.urlsplit(handler.path).path
        fault, dice = self._next(f"{handler.command} {_NAMES_OF_A_RUN.sub('*', path)}")
        length = int(handler.headers.get("Content-Length") or 0)
        if fault in {Fault.AWAY, Fault.DROP_UP}:
            handler.rfile.read(0 if fault is Fault.AWAY else length // 2)
            answer = None
        else:
            answer = self._answer(handler, handler.rfile.read(length), fault, dice)
        if answer is None:
            _hang_up(handler)
        else:
            _send(handler, answer, keep=dice.random() if fault is Fault.CUT else 1.0)

    def _answer(
        self, handler: BaseHTTPRequestHandler, body: bytes, fault: Fault | None, dice: random.Random
    ) -> _Answer | None:
        """Return what the client gets; None if the connection is dropped."""
        if fault is Fault.DELAY:
            time.sleep(dice.uniform(0, self.schedule.delay))
        if fault in _STATUS:
            return _refusal(_STATUS[fault])
        if fault is Fault.UNKEPT and handler.command == "PUT":
            return _Answer(200, [("ETag", f'"{hashlib.md5(body).hexdigest()}"')], b"")
        answer = self._ask(handler, _flipped(body, dice) if fault is Fault.FLIP_UP else body)
        if answer and fault is Fault.FLIP_DOWN:
            answer.body = _flipped(answer.body, dice)
        return None if fault is Fault.DROP_DOWN else answer

    def _ask(self, handler: BaseHTTPRequestHandler, body: bytes) -> _Answer | None:
        """Send the request on, and return the server's answer; None if the server hung up."""
        parts = urllib.parse.urlsplit(self.upstream)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_PATIENCE)
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _OF_A_CONNECTION}
        try:
            connection.request(handler.command, handler.path, body or None, headers)
            answer = connection.getresponse()
            return _Answer(answer.status, answer.getheaders(), answer.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


def _flipped(body: bytes, dice: random.Random) -> bytes:
    if not body:
        return body
    changed = bytearray(body)
    changed[dice.randrange(len(body))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _refusal(status: int) -> _Answer:
    headers = [("Retry-After", "1")] if status == 429 else []
    return _Answer(status, [*headers, ("Content-Type", "text/plain")], b"broken on purpose")


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def _send(handler: BaseHTTPRequestHandler, answer: _Answer, keep: float = 1.0) -> None:
    """Send the answer, or the first part of its body and then nothing more."""
    handler.send_response_only(answer.status)
    present = {name.lower() for name, _ in answer.headers}
    for name, value in answer.headers:
        if name.lower() not in _OF_A_CONNECTION:
            handler.send_header(name, value)
    if "content-length" not in present:
        handler.send_header("Content-Length", str(len(answer.body)))
    handler.end_headers()
    if handler.command == "HEAD":
        return
    part = answer.body[: int(len(answer.body) * keep)]
    handler.wfile.write(part)
    if len(part) < len(answer.body):
        handler.wfile.flush()
        _hang_up(handler)
