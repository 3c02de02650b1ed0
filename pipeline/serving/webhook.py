"""The receiver of MLflow's registry webhooks: an event about the alias wakes the reconciler.

An event is a wake-up call and nothing else. The reconciler reads the alias from the registry and verifies its version as at every
look, so that an event that is repeated, late or forged deploys nothing. The signature, the age and the memory of deliveries keep
strangers from waking it again and again.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mlflow.webhooks.constants import (
    WEBHOOK_DELIVERY_ID_HEADER,
    WEBHOOK_SIGNATURE_HEADER,
    WEBHOOK_SIGNATURE_VERSION,
    WEBHOOK_TIMESTAMP_HEADER,
)

from components.lib.errors import Refusal
from components.lib.settings import WebhookSettings

log = logging.getLogger(__name__)

AGE = 300.0
"""Seconds that the clocks of MLflow and of this machine may differ, with the way of the event."""

_LOOPBACK = "127.0.0.1"
_LARGEST = 65_536
"""Bytes of a body; an event of an alias has about 200."""
_PATIENCE = 10
"""Seconds that a sender may be silent."""
_ADDRESS = re.compile(r"(?:(?P<host>[^\s:]+):)?(?P<port>\d{1,5})")


class Rejected(Exception):
    """A delivery that does not count: its status of HTTP and the reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        """Keep the status beside the reason."""
        super().__init__(reason)
        self.status = status


class Inbox:
    """The events of one alias: takes deliveries, and lets the reconciler wait for one."""

    def __init__(self, name: str, alias: str, secret: str) -> None:
        """Name the registered model, the alias, and the secret that MLflow signs with."""
        self._name, self._alias = name, alias
        self._secret = secret.encode()
        self._came = threading.Event()
        self._taken: dict[str, float] = {}
        """When each delivery was sent, by its id."""
        self._lock = threading.Lock()

    def wait(self, seconds: float) -> None:
        """Wait so long, or until an event about the alias comes, or return at once if one came since the last call."""
        self._came.wait(seconds)
        self._came.clear()

    def take(self, headers: Message | Mapping[str, str], body: bytes) -> None:
        """Check a delivery, and end the waiting if it is about the alias.

        Raises:
            Rejected: the signature is not MLflow's, the delivery is old, or it was taken before.
        """
        delivery, stamp = headers.get(WEBHOOK_DELIVERY_ID_HEADER, ""), headers.get(WEBHOOK_TIMESTAMP_HEADER, "")
        signed = signature(self._secret, delivery, stamp, body)
        if not hmac.compare_digest(signed.encode(), headers.get(WEBHOOK_SIGNATURE_HEADER, "").encode()):
            raise Rejected(
                HTTPStatus.UNAUTHORIZED, "the signature does not hold: create the webhook with ESPALIER_WEBHOOK_SECRET"
            )
        sent = float(stamp)  # signed, so MLflow wrote it
        if abs(time.time() - sent) > AGE:
            raise Rejected(
                HTTPStatus.UNAUTHORIZED, f"the timestamp is more than {AGE:.0f} seconds away: set the clocks"
            )
        self._remember(delivery, sent)
        data = json.loads(body).get("data", {})
        if (data.get("name"), data.get("alias")) == (self._name, self._alias):
            self._came.set()

    def _remember(self, delivery: str, sent: float) -> None:
        """Note a delivery, and forget those that their age rejects from now on. Raises Rejected if it is noted already."""
        with self._lock:
            if delivery in self._taken:
                raise Rejected(HTTPStatus.CONFLICT, "this delivery was taken before")
            self._taken = {one: at for one, at in self._taken.items() if time.time() - at <= AGE} | {delivery: sent}


def signature(secret: bytes, delivery: str, stamp: str, body: bytes) -> str:
    """Return the signature of a delivery as MLflow computes it: HMAC-SHA256 over id, timestamp and body, with dots between."""
    digest = hmac.new(secret, f"{delivery}.{stamp}.".encode() + body, hashlib.sha256).digest()
    return f"{WEBHOOK_SIGNATURE_VERSION},{base64.b64encode(digest).decode()}"


@contextmanager
def listening(address: str | None, name: str, alias: str) -> Iterator[Callable[[float], object]]:
    """Receive the events about an alias during the block; yield the function that waits for one, or for so many seconds.

    Args:
        address: `PORT` on loopback, or `HOST:PORT`; if it is None, nothing is received.
        name: the registered model.
        alias: its alias.

    Raises:
        Refusal: the address cannot be listened on, or ESPALIER_WEBHOOK_SECRET is not set.
    """
    if address is None:
        yield time.sleep
        return
    secret = WebhookSettings().secret
    if secret is None:
        raise Refusal(
            "--webhook needs the secret that MLflow signs its events with: set ESPALIER_WEBHOOK_SECRET to the one that the "
            "webhook was created with"
        )
    inbox = Inbox(name, alias, secret.get_secret_value())
    server = _server(address, inbox)
    threading.Thread(target=server.serve_forever, name="webhook", daemon=True).start()
    try:
        yield inbox.wait
    finally:
        server.shutdown()
        server.server_close()


def _server(address: str, inbox: Inbox) -> ThreadingHTTPServer:
    match = _ADDRESS.fullmatch(address)
    if not match or not 0 < int(match["port"]) < 65_536:
        raise Refusal(f"--webhook is {address!r}: write a port, or HOST:PORT, such as {_LOOPBACK}:8765")

    class Handler(BaseHTTPRequestHandler):
        """Takes deliveries by POST, at any path."""

        server_version, sys_version = "espalier", ""
        timeout = _PATIENCE

        def do_POST(self) -> None:
            """Answer 204 to a delivery that counts, and say why one does not."""
            try:
                inbox.take(self.headers, self._body())
            except Rejected as rejected:
                log.warning("an event from %s is rejected: %s", self.client_address[0], rejected)
                self._answer(rejected.status, f"{rejected}\n".encode())
            else:
                self._answer(HTTPStatus.NO_CONTENT)

        def _body(self) -> bytes:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > _LARGEST:
                raise Rejected(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an event states its length, at most {_LARGEST} bytes"
                )
            return self.rfile.read(int(length))

        def _answer(self, status: HTTPStatus, text: bytes = b"") -> None:
            self.send_response(status)
            if text:
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            """Print no line for each request: standard error has what is rejected."""

    try:
        return ThreadingHTTPServer((match["host"] or _LOOPBACK, int(match["port"])), Handler)
    except OSError as error:
        raise Refusal(f"--webhook {address} cannot be listened on ({error.strerror}): name another port") from None
