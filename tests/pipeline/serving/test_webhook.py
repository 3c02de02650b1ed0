"""An event that MLflow signed wakes the reconciler; any other delivery changes nothing, and no event says what is deployed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from mlflow import MlflowClient
from mlflow.webhooks.constants import WEBHOOK_DELIVERY_ID_HEADER, WEBHOOK_SIGNATURE_HEADER, WEBHOOK_TIMESTAMP_HEADER

from components.lib.errors import Refusal
from components.lib.tracking import registry
from pipeline.services.embedded import services
from pipeline.serving.webhook import AGE, Inbox, Rejected, listening, signature
from tests.pipeline.serving.conftest import Register
from tests.pipeline.serving.given import deployed, free_port, wait_until

SECRET = "the secret of the tests"
HOUR = "3600"
"""Seconds between two looks: a reconciler that is faster was woken."""


def body(name: str = "model", alias: str = "champion", version: str = "1") -> bytes:
    data = {"name": name, "alias": alias, "version": version}
    return json.dumps({"entity": "model_version_alias", "action": "created", "data": data}).encode()


def signed(body: bytes, secret: str = SECRET, age: float = 0.0, delivery: str = "") -> dict[str, str]:
    """The headers of a delivery, as MLflow writes them."""
    delivery, stamp = delivery or str(uuid.uuid4()), str(int(time.time() - age))
    return {
        WEBHOOK_DELIVERY_ID_HEADER: delivery,
        WEBHOOK_TIMESTAMP_HEADER: stamp,
        WEBHOOK_SIGNATURE_HEADER: signature(secret.encode(), delivery, stamp, body),
    }


@pytest.fixture
def inbox() -> Inbox:
    return Inbox("model", "champion", SECRET)


def woken(inbox: Inbox) -> bool:
    """Whether an event came since the last call."""
    began = time.monotonic()
    inbox.wait(0.2)
    return time.monotonic() - began < 0.2


class TestAnEvent:
    def test_about_the_alias_wakes_once(self, inbox: Inbox) -> None:
        inbox.take(signed(body()), body())
        assert woken(inbox)
        assert not woken(inbox)

    @pytest.mark.parametrize("other", [body(name="another"), body(alias="challenger"), b'{"data": {}}'])
    def test_about_anything_else_is_taken_and_wakes_nobody(self, other: bytes, inbox: Inbox) -> None:
        inbox.take(signed(other), other)
        assert not woken(inbox)

    @pytest.mark.parametrize(
        ("headers", "sent"),
        [
            ({}, body()),
            (signed(body(), secret="another"), body()),
            (signed(body(version="1")), body(version="2")),
            (signed(body()) | {WEBHOOK_TIMESTAMP_HEADER: str(int(time.time()) + 1)}, body()),
            (signed(body()) | {WEBHOOK_DELIVERY_ID_HEADER: "another"}, body()),
        ],
        ids=["unsigned", "by another secret", "with another body", "with another time", "with another id"],
    )
    def test_that_mlflow_did_not_sign_is_rejected(self, headers: Mapping[str, str], sent: bytes, inbox: Inbox) -> None:
        with pytest.raises(Rejected, match="the signature does not hold"):
            inbox.take(headers, sent)
        assert not woken(inbox)

    @pytest.mark.parametrize("age", [AGE + 10, -AGE - 10])
    def test_that_is_old_or_of_the_future_is_rejected(self, age: float, inbox: Inbox) -> None:
        with pytest.raises(Rejected, match="more than 300 seconds away"):
            inbox.take(signed(body(), age=age), body())
        assert not woken(inbox)

    def test_that_is_replayed_is_rejected(self, inbox: Inbox) -> None:
        headers = signed(body())
        inbox.take(headers, body())
        assert woken(inbox)
        with pytest.raises(Rejected, match="taken before"):
            inbox.take(headers, body())
        assert not woken(inbox)


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:", "1:2:3", "0", "70000"])
def test_an_address_that_is_none_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_WEBHOOK_SECRET", SECRET)
    with pytest.raises(Refusal, match=r"--webhook is .*: write a port"), listening(address, "model", "champion"):
        pass


def test_without_a_secret_no_event_is_received() -> None:
    with pytest.raises(Refusal, match="set ESPALIER_WEBHOOK_SECRET"), listening("8765", "model", "champion"):
        pass


def test_a_port_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_WEBHOOK_SECRET", SECRET)
    port = str(free_port())
    with (
        listening(port, "model", "champion"),
        pytest.raises(Refusal, match=f"--webhook {port} cannot be listened on"),
        listening(port, "model", "champion"),
    ):
        pass


@pytest.fixture(scope="module")
def mlflow_with_webhooks(servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow that may send events to loopback by http; it keeps artifacts on the shared S3."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in servers.items():
                patch.setenv(name, value)
            patch.delenv("MLFLOW_TRACKING_URI")
            patch.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
            patch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http,https")
            patch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
            environment = stack.enter_context(services(tmp_path_factory.mktemp("webhooks-home")))
        yield environment["MLFLOW_TRACKING_URI"]


@pytest.fixture
def name(environment: dict[str, str], mlflow_with_webhooks: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered model of that MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_with_webhooks)
    return f"model-{uuid.uuid4().hex[:8]}"


def deliver(port: int, headers: Mapping[str, str], sent: bytes) -> tuple[int, str]:
    """Send a delivery, and return the status and the text of the answer."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", sent, dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_mlflow_wakes_a_reconciler_that_looks_once_an_hour_and_nobody_else_does(
    name: str, register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_WEBHOOK_SECRET", SECRET)
    file, port = tmp_path / "champion.yaml", free_port()
    webhook = MlflowClient().create_webhook(
        "espalier",
        f"http://127.0.0.1:{port}",
        ["model_version_alias.created", "model_version_alias.deleted"],
        secret=SECRET,
    )
    register("first", "champion")
    register("second")
    command = [sys.executable, "-m", "pipeline.cli.main", "deploy", f"{name}@champion", "--out", str(file)]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*command, "--watch", "--every", HOUR, "--webhook", str(port)], stdout=said, env=os.environ
        )
    try:
        wait_until(lambda: deployed(file) == "1", process)
        assert MlflowClient().test_webhook(webhook.webhook_id).response_status == 204
        lie = body(name, version="2")
        for headers, status, reason in (
            ({}, 401, "signature"),
            (signed(lie, secret="another"), 401, "signature"),
            (signed(lie, age=2 * AGE), 401, "timestamp"),
            (signed(lie, delivery="one"), 204, ""),  # the registry still says 1
            (signed(lie, delivery="one"), 409, "taken before"),
        ):
            answered, text = deliver(port, headers, lie)
            assert (answered, reason in text) == (status, True)
        assert deliver(port, signed(b"x" * 70_000), b"x" * 70_000)[0] == 413
        time.sleep(1)
        assert deployed(file) == "1"
        registry.set_alias(name, "champion", "2")
        wait_until(lambda: deployed(file) == "2", process)
        registry.drop_alias(name, "champion", "2")
        wait_until(lambda: "NoVersion" in (tmp_path / "said").read_text(), process)
    finally:
        process.terminate()
        process.wait(30)
        MlflowClient().delete_webhook(webhook.webhook_id)
    conditions = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert [one["reason"] for one in conditions] == ["Deployed", "Deployed", "NoVersion"]
    assert deployed(file) == "2"
