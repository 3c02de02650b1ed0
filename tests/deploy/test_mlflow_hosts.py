"""MLflow, started as the cluster starts it but for its database: it answers to the names that the cluster has for it."""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
FROM_OUTSIDE = {"--host", "--port", "--workers", "--artifacts-destination"}


def arguments() -> list[str]:
    documents = yaml.safe_load_all((DEPLOY / "platform" / "mlflow.yaml").read_text())
    (deployment,) = [one for one in documents if one["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return [part for part in container["args"] if part.partition("=")[0] not in FROM_OUTSIDE]


def ask(port: int, path: str, host: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={"Host": host})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = ["--host=127.0.0.1", f"--port={port}", "--workers=1", f"--artifacts-destination={folder}"]
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, "-m", "mlflow", *arguments(), *here]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and server.poll() is None:
            try:
                if ask(port, "/health", "10.1.2.3:5000") == 200:
                    break
            except OSError:
                time.sleep(0.3)
        else:
            pytest.fail((folder / "log").read_text()[-2000:])
        yield port
    finally:
        os.killpg(server.pid, 15)
        server.wait()


@pytest.mark.parametrize("name", ["mlflow.espalier.svc.cluster.local:5000", "mlflow.espalier:5000", "localhost:5000"])
def test_it_answers_to_its_names(mlflow: int, name: str) -> None:
    assert ask(mlflow, "/api/2.0/mlflow/experiments/get?experiment_id=0", name) == 200


@pytest.mark.parametrize("name", ["mlflow.espalier.svc.cluster.local", "evil.example.org:5000"])
def test_it_answers_to_no_other(mlflow: int, name: str) -> None:
    """The port is part of the name: without it MLflow does not know itself."""
    assert ask(mlflow, "/api/2.0/mlflow/experiments/get?experiment_id=0", name) == 403


def test_probes_name_no_host_and_are_answered(mlflow: int) -> None:
    assert ask(mlflow, "/health", "10.1.2.3:5000") == 200
