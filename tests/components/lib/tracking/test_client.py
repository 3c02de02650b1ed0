"""The server that the environment names: it answers, or the refusal says how to correct it."""

from __future__ import annotations

import http.server
import threading
from typing import Any

import pytest

from components.lib.errors import Unavailable
from components.lib.tracking import client
from tests.components.lib.tracking.given import AWAY, NOWHERE


class TestTheServer:
    def test_is_there(self, environment: dict[str, str]) -> None:
        client.check()

    def test_that_is_not_named_is_refused_rather_than_a_local_file_written(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(Unavailable, match="MLFLOW_TRACKING_URI is not set: start the embedded services"):
            client.check()

    def test_that_does_not_answer_is_refused_with_its_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(*AWAY)
        with pytest.raises(
            Unavailable, match=rf"^MLflow at {NOWHERE} does not answer \(.*refused.*\): start it, or correct"
        ):
            client.check()

    @pytest.mark.parametrize("status", [401, 403])
    def test_that_turns_this_client_away_is_refused_with_what_to_set(
        self, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class TurnsAway(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_error(status)

            def log_message(self, *_: Any) -> None:
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), TurnsAway) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
            with pytest.raises(Unavailable, match=rf"refuses this client \({status}\): set MLFLOW_TRACKING_TOKEN"):
                client.check()
            server.shutdown()
