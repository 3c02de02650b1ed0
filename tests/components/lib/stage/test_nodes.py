"""A stage on several nodes: one job, followed to its end, named where it fails, and deleted."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.lib.errors import Refusal, StageFailed, Unavailable
from components.lib.stage import nodes
from components.lib.stage.events import EVENT
from components.lib.stage.nodes import Piece, run_on_nodes
from components.lib.store.artifacts import Reference
from components.lib.store.store import Store
from components.lib.training import ranks
from tests.components.lib.stage.cluster import NAME, Cluster, cluster
from tests.components.lib.stage.node import STAGE, node

KEY = "0123456789abcdef" * 4
PIECE = Piece("lora_rft", "", "run-1", "recover: {steps: 3}", {"model": f"s3://bucket/model@sha256:{'a' * 64}"})
MANIFEST = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainJob",
    "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "team"}},
    "spec": {
        "runtimeRef": {"name": "torch-distributed"},
        "trainer": {
            "image": "registry.example.org/espalier@sha256:0",
            "command": ["python", "-m", "components.lib.stage.nodes"],
            "numNodes": 2,
            "env": [{"name": "ESPALIER_BUCKET", "value": "espalier"}],
        },
    },
}


@pytest.fixture
def kubernetes() -> Iterator[Cluster]:
    with cluster() as double:
        yield double


def follow(**changed: Any) -> list[str]:
    """Run the job, and return the states that it was seen in."""
    seen: list[str] = []
    piece = replace(PIECE, **changed)
    run_on_nodes(piece, KEY, MANIFEST, lambda event, **details: seen.append(details["state"]), pause=0.01)
    return seen


class TestTheJob:
    def test_is_the_profiles_with_the_name_of_the_key_and_the_stage_as_its_argument(
        self, kubernetes: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_RUN_ID", "made-by-the-plugin")
        kubernetes.on_look = kubernetes.state("Complete")
        follow()
        (job,) = kubernetes.created
        trainer = job["spec"]["trainer"]
        assert job["metadata"] == MANIFEST["metadata"] | {"name": NAME, "annotations": {"espalier/run": "run-1"}}
        assert Piece(**json.loads(trainer.pop("args")[0])) == PIECE
        assert trainer.pop("env") == [
            {"name": "ESPALIER_BUCKET", "value": "espalier"},
            {"name": "MLFLOW_RUN_ID", "value": "made-by-the-plugin"},
        ]
        assert trainer.items() <= MANIFEST["spec"]["trainer"].items()
        assert (kubernetes.deleted, kubernetes.jobs) == ([NAME], {})

    def test_is_followed_from_the_queue_to_its_end(
        self, kubernetes: Cluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def running(job: dict[str, Any]) -> None:
            job["status"] = {}
            kubernetes.nodes({"phase": "Running"}, {"phase": "Pending"})(job)

        kubernetes.logs = {f"{NAME}-node-0-0-abcde": f'{EVENT}{{"event": "progress"}}\nthe end\n'}
        kubernetes.moves = [
            kubernetes.state("Suspended", "Suspended", "TrainJob is suspended"),
            running,
            running,
            kubernetes.nodes({}, {}),
            kubernetes.state("Complete"),
        ]
        assert follow() == ["suspended (Suspended: TrainJob is suspended)", "1 of 2 nodes run", "2 of 2 nodes run"]
        assert capsys.readouterr().out == f'{EVENT}{{"event": "progress"}}\nthe end\n'

    def test_of_the_same_key_that_is_at_work_is_taken_up(self, kubernetes: Cluster) -> None:
        kubernetes.add("run-1")
        kubernetes.moves = [kubernetes.nodes({}, {})]
        kubernetes.on_look = kubernetes.state("Complete")
        follow()
        assert (kubernetes.created, kubernetes.deleted) == ([], [NAME])

    def test_of_another_run_is_followed_and_left(self, kubernetes: Cluster) -> None:
        kubernetes.add("other")
        kubernetes.moves = [kubernetes.nodes({}, {})]
        kubernetes.on_look = kubernetes.state("Complete")
        follow()
        assert (kubernetes.created, kubernetes.deleted) == ([], [])

    def test_that_ended_before_is_replaced(self, kubernetes: Cluster) -> None:
        kubernetes.state("Failed", "JobsFailed")(kubernetes.add("run-0"))
        before = {"ended": {"exitCode": 1}, "created": "2025-12-31T23:00:00Z"}
        kubernetes.moves = [
            lambda job: None,
            kubernetes.nodes(before, before),
        ]  # the pods of the old one are still there
        kubernetes.on_create = lambda job: setattr(kubernetes, "on_look", kubernetes.state("Complete"))
        follow()
        assert (len(kubernetes.created), kubernetes.deleted) == (1, [NAME, NAME])

    def test_that_is_gone_has_ended(self, kubernetes: Cluster) -> None:
        kubernetes.on_look = kubernetes.vanish
        follow()
        assert kubernetes.deleted == []


class TestAFailure:
    def test_names_the_node_that_failed_first_and_shows_its_log(
        self, kubernetes: Cluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first = {"exitCode": 1, "reason": "Error", "message": "ProcessFailed: process 2 of 2 failed with KeyError: 'x'"}
        second = {"exitCode": 1, "finishedAt": "2026-01-01T00:00:02Z", "message": "ProcessFailed: connection closed"}
        kubernetes.on_look = kubernetes.nodes({"ended": second}, {"ended": first})
        kubernetes.logs = {f"{NAME}-node-0-1-abcde": "Traceback\n"}
        with pytest.raises(nodes.NodeFailed) as raised:
            follow()
        assert str(raised.value) == (
            f"node 2 of 2 failed with ProcessFailed: process 2 of 2 failed with KeyError: 'x', in the pod {NAME}-node-0-1-abcde on "
            "machine-1: a new run goes on from the last checkpoint"
        )
        assert "Traceback" in capsys.readouterr().out
        assert kubernetes.deleted == [NAME]

    def test_counts_though_kubernetes_started_the_container_again(self, kubernetes: Cluster) -> None:
        killed = {"exitCode": 137, "reason": "OOMKilled"}
        kubernetes.on_look = kubernetes.nodes({"ended": killed, "again": True}, {})
        with pytest.raises(
            nodes.NodeFailed, match=r"^node 1 of 2 failed with exit status 137 \(OOMKilled\), in the pod"
        ):
            follow()

    @pytest.mark.parametrize("kind", [Refusal, Unavailable])
    def test_that_is_a_refusal_stays_one(self, kind: type[Exception], kubernetes: Cluster) -> None:
        kubernetes.on_look = kubernetes.nodes({"ended": {"exitCode": 1, "message": f"{kind.__name__}: lower it"}}, {})
        with pytest.raises(kind, match=r"^lower it$") as raised:
            follow()
        assert type(raised.value) is kind

    def test_of_the_job_is_told_in_its_words(self, kubernetes: Cluster) -> None:
        kubernetes.on_look = kubernetes.state("Failed", "TrainingRuntimeNotSupported", "no such runtime")
        with pytest.raises(nodes.NodeFailed, match=r"failed \(TrainingRuntimeNotSupported: no such runtime\)"):
            follow()
        assert kubernetes.deleted == [NAME]

    @pytest.mark.parametrize(
        ("code", "said"),
        [(403, "deploy/watcher/service-account.yaml"), (404, "install Kubeflow Trainer"), (422, "correct trainer")],
    )
    def test_of_the_api_says_what_to_do(self, code: int, said: str, kubernetes: Cluster) -> None:
        kubernetes.refuses = (code, "the reason")
        with pytest.raises(Refusal, match=rf"answered {code} to the TrainJob {NAME} \(the reason\): .*{said}"):
            follow()

    def test_of_the_api_for_a_while_is_waited_out(self, kubernetes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        def away(job: dict[str, Any]) -> None:
            kubernetes.refuses = (503, "away")
            threading.Timer(0.3, lambda: setattr(kubernetes, "refuses", None)).start()

        kubernetes.moves = [away]
        kubernetes.on_look = kubernetes.state("Complete")
        follow()
        assert kubernetes.deleted == [NAME]
        kubernetes.moves = [away]
        monkeypatch.setattr(nodes, "PATIENCE", 0.0)
        with pytest.raises(Unavailable, match="answered 503"):
            follow()


def test_sigterm_deletes_the_job(kubernetes: Cluster) -> None:
    def cancel(job: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    kubernetes.moves = [kubernetes.nodes({}, {}), cancel]
    with pytest.raises(StageFailed, match=r"^lora_rft was ended by SIGTERM"):
        follow()
    assert (kubernetes.deleted, kubernetes.jobs) == ([NAME], {})
    assert signal.getsignal(signal.SIGTERM) is before


class Kubelet:
    """Starts the nodes of a job as processes, with the variables that the torch runtime sets."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.processes: list[Any] = []

    def start(self, job: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        trainer = job["spec"]["trainer"]
        given = {variable["name"]: variable["value"] for variable in trainer["env"]}
        for number in range(trainer["numNodes"]):
            runtime = {
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NODE_RANK": str(number),
                "PET_NPROC_PER_NODE": "auto",
                "PET_MASTER_ADDR": "localhost",
                "PET_MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": ranks.LOOPBACK,
            }
            process = multiprocessing.get_context("spawn").Process(
                target=node, args=(self.folder / str(number), given | runtime, trainer["args"])
            )
            process.start()
            self.processes.append(process)

    def look(self, job: dict[str, Any]) -> None:
        """Give the job the state of its processes."""
        time.sleep(0.2)
        states = [self._state(number, process.exitcode) for number, process in enumerate(self.processes)]
        self.cluster.nodes(*states)(job)
        if all(process.exitcode == 0 for process in self.processes):
            self.cluster.state("Complete")(job)

    def _state(self, number: int, exit_code: int | None) -> dict[str, Any]:
        if exit_code is None:
            return {}
        log = self.folder / str(number) / "termination-log"
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(log.stat().st_mtime))
        return {"ended": {"exitCode": exit_code, "message": log.read_text(), "finishedAt": at}}


@pytest.fixture
def stage(
    environment: dict[str, str], kubernetes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], str]]:
    """Run the stage on two nodes that hold this text, and return its reference."""
    kubelet = Kubelet(kubernetes, tmp_path)
    kubernetes.on_create, kubernetes.on_look = kubelet.start, kubelet.look
    manifest = json.loads(json.dumps(MANIFEST))
    manifest["spec"]["trainer"]["env"] = [{"name": key, "value": value} for key, value in environment.items()]
    monkeypatch.setenv("ESPALIER_TRAINJOB", json.dumps(manifest))
    monkeypatch.delenv("PET_NNODES", raising=False)

    def run(text: str) -> str:
        (tmp_path / "model").mkdir()
        (tmp_path / "model/notes.json").write_text(text)
        model = str(Store.from_environment().put_content(tmp_path / "model", "releases"))
        recipe = "methods: {trsp: {ratio: 0.5}}\ncalibration: {data: a.txt}\nevaluate: {perplexity: {test: a.txt}}\n"
        return STAGE.run("one", recipe, model=model)

    yield run
    for process in kubelet.processes:
        process.kill()
        process.join()


@pytest.mark.timeout(900)
class TestTheNodes:
    def test_are_one_stage_with_one_journal_and_one_output(self, stage: Callable[[str], str], tmp_path: Path) -> None:
        left = Store.from_environment().get(Reference.parse(stage("{}")), tmp_path / "left")
        assert (left / "processes").read_text() == "2"
        assert json.loads((left / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}

    def test_refuse_in_the_words_of_the_one_that_did(
        self, stage: Callable[[str], str], kubernetes: Cluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(Refusal, match=r"^lower it$"):
            stage("refuse")
        assert json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix(EVENT))["event"] == "refused"
        assert len(kubernetes.deleted) == 1
