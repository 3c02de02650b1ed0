"""The proxy breaks requests as its schedule says, and passes on all others."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.faults.proxy import Fault, Proxy, Schedule

BODY = bytes(range(256))


class Server(ThreadingHTTPServer):
    """Answers every GET with BODY, and keeps what is PUT."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.asked = 0
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def do_PUT(self) -> None:
        self.server.kept.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def ask(server: Server, *faults: Fault, data: bytes | None = None) -> bytes:
    """Send one request through a proxy that breaks every one."""
    address = f"http://127.0.0.1:{server.server_address[1]}"
    with Proxy(address, Schedule(0, rate=float(bool(faults)), faults=faults, delay=0.01, away=0.01)) as proxy:
        request = urllib.request.Request(f"{proxy.address}/x", data=data, method="GET" if data is None else "PUT")
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read()


def test_a_request_that_is_not_broken_passes(server: Server) -> None:
    assert ask(server) == ask(server, Fault.DELAY) == BODY
    ask(server, data=BODY)
    assert server.kept == [BODY]


@pytest.mark.parametrize(("fault", "status"), [(Fault.ERROR_500, 500), (Fault.ERROR_503, 503), (Fault.ERROR_429, 429)])
def test_an_error_is_answered_without_asking_the_server(server: Server, fault: Fault, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        ask(server, fault)
    assert raised.value.code == status
    assert raised.value.headers.get("Retry-After") == ("1" if status == 429 else None)
    assert server.asked == 0


def test_a_body_is_cut_short(server: Server) -> None:
    with pytest.raises(http.client.IncompleteRead):
        ask(server, Fault.CUT)


def test_one_bit_flips_down_and_up(server: Server) -> None:
    for got in (ask(server, Fault.FLIP_DOWN), ask(server, Fault.FLIP_UP, data=BODY) or server.kept[0]):
        assert sum((one ^ other).bit_count() for one, other in zip(got, BODY, strict=True)) == 1


@pytest.mark.parametrize(("fault", "arrived"), [(Fault.DROP_UP, []), (Fault.AWAY, []), (Fault.DROP_DOWN, [BODY])])
def test_a_connection_drops_before_or_after_the_work(server: Server, fault: Fault, arrived: list[bytes]) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(server, fault, data=BODY)
    assert server.kept == arrived


def test_an_upload_is_taken_and_not_kept(server: Server) -> None:
    ask(server, Fault.UNKEPT, data=BODY)
    assert server.kept == []


def test_the_same_seed_breaks_the_same_requests() -> None:
    def drawn(seed: int) -> list[Fault | None]:
        return [Schedule(seed).draw("GET /x", occurrence)[0] for occurrence in range(50)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
