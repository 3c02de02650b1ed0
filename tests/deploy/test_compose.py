"""The services of one host: each tells whether it is well, none holds a secret, none is open to the network."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_there_are_the_three_services(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"postgres", "s3", "mlflow"}


def test_every_service_tells_whether_it_is_well(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["healthcheck"]["test"][0] == "CMD", name


def test_mlflow_waits_until_what_it_needs_is_well(compose: dict[str, Any]) -> None:
    waits = compose["services"]["mlflow"]["depends_on"]
    assert waits == {"postgres": {"condition": "service_healthy"}, "s3": {"condition": "service_healthy"}}


def test_ports_are_open_to_this_host_alone(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_secrets_come_from_outside_and_have_no_default(compose: dict[str, Any]) -> None:
    secret = re.compile(r"PASSWORD|KEY|BACKEND_STORE_URI")
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if secret.search(name):
                assert re.search(r"\$\{\w+:\?", value), name
    asked = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text()))
    example = dict(
        line.split("=", 1) for line in (DEPLOY / "compose.env.example").read_text().splitlines() if line[:1].isalpha()
    )
    assert example == dict.fromkeys(asked, "")


def test_mlflow_allows_the_published_address(compose: dict[str, Any]) -> None:
    mlflow = compose["services"]["mlflow"]
    (allowed,) = [part.partition("=")[2] for part in mlflow["command"] if part.startswith("--allowed-hosts=")]
    (port,) = [port.rsplit(":", 1)[0] for port in mlflow["ports"]]
    assert port in allowed.split(",")
