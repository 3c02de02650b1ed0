"""A double of the Kubernetes API that holds TrainJobs and their pods as JSON, checked by the models of Kubeflow Trainer's client.

It creates no pod by itself: a test says what each look at a job finds, or starts the nodes as processes.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from kubernetes import client, config

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/default/trainjobs"
PODS = "/api/v1/namespaces/default/pods"

NAME = "lora-rft-0123456789abcdef"
"""The job that `Cluster.add` adds."""

CREATED = "2026-01-01T00:00:00Z"
"""When every job and pod was created."""

Job = dict[str, Any]
Move = Callable[[Job], None]
"""Changes a job and its pods before it is looked at."""


class Cluster:
    """The state of the double."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.pods: dict[str, list[dict[str, Any]]] = {}
        self.logs: dict[str, str] = {}
        self.created: list[Job] = []
        self.deleted: list[str] = []
        self.moves: list[Move] = []
        """What the next looks at a job find, one for each; then it stays as it is."""
        self.on_create: Move | None = None
        self.on_look: Move | None = None
        self.refuses: tuple[int, str] | None = None
        """The status and the message with which it refuses every request."""

    def answer(self, method: str, address: str, body: Any) -> tuple[int, Any]:
        """Return the status and the body of an answer."""
        path, query = urlsplit(address).path, parse_qs(urlsplit(address).query)
        if self.refuses:
            return self.refuses[0], status(*self.refuses)
        if path == JOBS and method == "POST":
            return self._create(body)
        if match := re.fullmatch(f"{JOBS}/([^/]+)", path):
            return self._delete(match[1]) if method == "DELETE" else self._look(match[1])
        if path == PODS:
            name = query["labelSelector"][0].removeprefix("jobset.sigs.k8s.io/jobset-name=")
            return 200, {"apiVersion": "v1", "kind": "PodList", "items": self.pods.get(name, [])}
        if match := re.fullmatch(f"{PODS}/([^/]+)/log", path):
            return 200, self.logs.get(match[1], "")
        return 404, status(404, f"there is no {path}")

    def _create(self, body: Job) -> tuple[int, Any]:
        known = TrainerV1alpha1TrainJob.from_dict(body)
        if known is None or known.to_dict() != body:
            return 422, status(422, "the TrainJob has a field that is not known")
        name = body["metadata"]["name"]
        if not re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
            return 422, status(422, "metadata.name must match RFC 1035 DNS label format")
        if name in self.jobs:
            return 409, status(409, f'trainjobs "{name}" already exists')
        self.jobs[name] = body | {"metadata": body["metadata"] | {"creationTimestamp": CREATED}}
        self.created.append(json.loads(json.dumps(body)))
        if self.on_create:
            self.on_create(self.jobs[name])
        return 201, self.jobs[name]

    def _look(self, name: str) -> tuple[int, Any]:
        move = self.moves.pop(0) if self.moves else self.on_look
        if name in self.jobs and move:
            move(self.jobs[name])
        return (200, self.jobs[name]) if name in self.jobs else (404, status(404, f'trainjobs "{name}" not found'))

    def _delete(self, name: str) -> tuple[int, Any]:
        if self.jobs.pop(name, None) is None:
            return 404, status(404, f'trainjobs "{name}" not found')
        self.deleted.append(name)
        self.pods.pop(name, None)
        return 200, {"kind": "Status", "status": "Success"}

    def state(self, kind: str, reason: str = "", message: str = "") -> Move:
        """Return the move that gives a job a condition."""

        def move(job: Job) -> None:
            condition = {"type": kind, "status": "True", "reason": reason, "message": message}
            job.setdefault("status", {})["conditions"] = [condition]

        return move

    def nodes(self, *given: dict[str, Any]) -> Move:
        """Return the move that gives a job its pods; of each, `pod` takes the arguments."""

        def move(job: Job) -> None:
            name = job["metadata"]["name"]
            self.pods[name] = [pod(name, number, **one) for number, one in enumerate(given)]

        return move

    def add(self, run: str) -> Job:
        """Add a job as another task of a run created it, and return it."""
        metadata = {"name": NAME, "annotations": {"espalier/run": run}, "creationTimestamp": CREATED}
        self.jobs[NAME] = {"metadata": metadata, "status": {}}
        return self.jobs[NAME]

    def vanish(self, job: Job) -> None:
        """Take the job away, as somebody who deletes it does."""
        del self.jobs[job["metadata"]["name"]]


def pod(
    job: str,
    number: int,
    phase: str = "Running",
    ended: dict[str, Any] | None = None,
    again: bool = False,
    created: str = CREATED,
) -> dict[str, Any]:
    """Return the pod of a node.

    Args:
        job: its job.
        number: of the node.
        phase: of the pod.
        ended: how its container ended.
        again: whether it was started again since.
        created: when the pod was.
    """
    done = {"terminated": {"finishedAt": CREATED, **ended}} if ended else {}
    running = {"running": {"startedAt": CREATED}}
    states = {"state": running, "lastState": done} if again else {"state": done or running}
    container = {"name": "node", "image": "i", "imageID": "i", "ready": not done, "restartCount": int(again), **states}
    return {
        "metadata": {
            "name": f"{job}-node-0-{number}-abcde",
            "creationTimestamp": created,
            "labels": {
                "jobset.sigs.k8s.io/jobset-name": job,
                "batch.kubernetes.io/job-completion-index": str(number),
            },
        },
        "spec": {"nodeName": f"machine-{number}", "containers": [{"name": "node"}]},
        "status": {"phase": phase, "containerStatuses": [container]},
    }


def status(code: int, message: str) -> dict[str, Any]:
    """Return the body with which Kubernetes says that it refuses."""
    return {"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "message": message}


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Serve a double, and let the Kubernetes client speak to it as it speaks to the cluster that a pod is in."""
    double = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            code, answer = double.answer(self.command, self.path, body)
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "load_config", lambda: client.Configuration.set_default(address))
        yield double
    client.Configuration.set_default(client.Configuration())
    server.shutdown()
    server.server_close()
