"""A stage on several nodes: its task starts a TrainJob of Kubeflow Trainer, follows it, and deletes it.

The task gets the manifest from the profile (ESPALIER_TRAINJOB), and the job is named by the key of the output, so that a task that is tried
again takes up the job that is at work. Every node runs `main`: it fetches the inputs and joins the group of processes. The
first node keeps the journal and the checkpoints, and puts the output into the store.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from urllib3.exceptions import HTTPError

from components.lib.errors import Refusal, StageFailed, Unavailable, of_machine, refusal_from
from components.lib.recipe.loading import parse_recipe
from components.lib.settings import MlflowSettings
from components.lib.stage.declaration import References, declared_stages
from components.lib.stage.events import EventSink, StageEvents
from components.lib.store.store import Store

KIND = ("trainer.kubeflow.org", "v1alpha1")
PLURAL = "trainjobs"
NODE = "node"
"""The name of the container in a pod of the job, in every runtime of Kubeflow Trainer."""

RUN = "espalier/run"
"""The annotation with the label of the run that created the job: no other run deletes it."""

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""The namespace of this pod; the job is in the same one."""

TERMINATION = Path("/dev/termination-log")
"""What a container leaves in this file, Kubernetes shows in the state of its pod."""

PATIENCE = 600.0
"""Seconds that the Kubernetes API may be unreachable while a job is followed; the job goes on meanwhile."""


class NodeFailed(StageFailed):
    """A node of the job failed with an error that is not a refusal."""


@dataclass(frozen=True)
class Piece:
    """A stage to run: what a node needs to open it."""

    stage: str
    variant: str
    run: str
    """The label of the recompression."""
    recipe: str
    """The recipe's YAML, its texts replaced by references."""
    references: References

    @property
    def label(self) -> str:
        """The stage's name as a progress display shows it."""
        return f"{self.stage} {self.variant}".strip()


def run_on_nodes(piece: Piece, key: str, manifest: Mapping[str, Any], sink: EventSink, pause: float = 5.0) -> None:
    """Run a stage as a TrainJob, and return when the job has ended without an error.

    Show the log of its first node meanwhile. A job with this key that is at work is taken up. The job is deleted at the end, whatever that is,
    and on SIGTERM.

    Args:
        piece: the stage.
        key: of its output; it names the job.
        manifest: the TrainJob without a name and arguments.
        sink: receives an event for each state of the job.
        pause: seconds between two looks.

    Raises:
        Refusal: the cluster does not take the job, or a node raised it.
        NodeFailed: a node ended otherwise; the message names it.
    """
    job = Job(piece, key, manifest)
    with _cancelled_by_sigterm(piece.label):
        try:
            job.create(pause)
            job.follow(sink, pause)
        finally:
            job.discard()


class Job:
    """The TrainJob of one stage in the namespace of this pod."""

    def __init__(self, piece: Piece, key: str, manifest: Mapping[str, Any]) -> None:
        """Connect to the Kubernetes API: as the pod's service account, or as the kubeconfig says."""
        from kubernetes import client, config

        config.load_config()
        self.name = f"{piece.stage.replace('_', '-')}-{key[:16]}"
        self.namespace = NAMESPACE.read_text().strip() if NAMESPACE.exists() else "default"
        self.run = piece.run
        self.nodes = manifest["spec"]["trainer"]["numNodes"]
        self.body = _named(manifest, self.name, piece)
        self._jobs, self._pods = client.CustomObjectsApi(), client.CoreV1Api()
        self._error = client.ApiException
        self._logs: dict[str, threading.Thread] = {}

    def create(self, pause: float) -> None:
        """Create the job, or take up the one that has its name and is at work; one that has ended is replaced.

        Raises:
            Refusal: the cluster does not take it.
        """
        while True:
            try:
                self._jobs.create_namespaced_custom_object(*KIND, self.namespace, PLURAL, self.body)
            except self._error as error:
                if error.status != 409:
                    raise self._refused(error) from None
            else:
                return
            found = self._get()
            if found is None:
                continue
            if "deletionTimestamp" not in found["metadata"]:
                if not _ended(found):
                    return
                self._delete()
            time.sleep(pause)

    def follow(self, sink: EventSink, pause: float) -> None:
        """Wait until the job has ended, and show the log of its first node. A job that is gone has ended too.

        Raises:
            Refusal: a node raised it, or the API does not answer for ten minutes.
            NodeFailed: a node failed otherwise, or the job did.
        """
        answered, shown = time.monotonic(), ""
        while True:
            try:
                found = self._get()
                pods = self._pods_of(found) if found else []
            except (self._error, HTTPError, OSError) as error:
                if time.monotonic() - answered > PATIENCE:
                    raise self._refused(error) from None
            else:
                answered = time.monotonic()
                if ended := _first_to_fail(pods):
                    self._print_end_of_log(ended[0].metadata.name)
                    raise _failure(*ended, self.nodes)
                if found is None or _condition(found, "Complete"):
                    self._finish_logs()
                    return
                if failed := _condition(found, "Failed"):
                    raise NodeFailed(
                        f"the TrainJob {self.name} failed ({failed}): a new run goes on from the last checkpoint"
                    )
                if (state := _state(found, pods, self.nodes)) != shown:
                    shown = state
                    sink("nodes", job=self.name, state=state)
                self._show_log(pods)
            time.sleep(pause)

    def discard(self) -> None:
        """Delete the job unless another run created it. Print a failure and never raise: it must not hide the stage's error."""
        try:
            found = self._get()
            if found and found["metadata"].get("annotations", {}).get(RUN) == self.run:
                self._delete()
        except Exception as error:
            print(
                f"the TrainJob {self.name} was not deleted ({_said(error)}): kubectl delete trainjob {self.name}",
                flush=True,
            )

    def _get(self) -> dict[str, Any] | None:
        try:
            return self._jobs.get_namespaced_custom_object(*KIND, self.namespace, PLURAL, self.name)
        except self._error as error:
            if error.status == 404:
                return None
            raise

    def _delete(self) -> None:
        try:
            self._jobs.delete_namespaced_custom_object(*KIND, self.namespace, PLURAL, self.name)
        except self._error as error:
            if error.status != 404:
                raise

    def _pods_of(self, job: Mapping[str, Any]) -> list[Any]:
        """Return the job's pods. Those of a job that had its name before may still be there."""
        began = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
        selector = f"jobset.sigs.k8s.io/jobset-name={self.name}"
        pods = self._pods.list_namespaced_pod(self.namespace, label_selector=selector).items
        return [pod for pod in pods if pod.metadata.creation_timestamp >= began]

    def _show_log(self, pods: list[Any]) -> None:
        """Follow the log of the first node in a thread of its own."""
        for pod in pods:
            name = pod.metadata.name
            if _number(pod) == 0 and pod.status.phase in ("Running", "Succeeded") and name not in self._logs:
                self._logs[name] = threading.Thread(target=self._relay, args=(name,), daemon=True)
                self._logs[name].start()

    def _relay(self, pod: str) -> None:
        # The log is a courtesy: a stream that breaks off must not end the stage.
        with contextlib.suppress(Exception):
            stream = self._pods.read_namespaced_pod_log(
                pod, self.namespace, container=NODE, follow=True, _preload_content=False
            )
            for line in stream:
                print(line.decode(errors="replace").rstrip("\n"), flush=True)

    def _print_end_of_log(self, pod: str) -> None:
        """Print what a node wrote before it failed: its pod is deleted with the job."""
        with contextlib.suppress(Exception):
            print(self._pods.read_namespaced_pod_log(pod, self.namespace, container=NODE, tail_lines=50), flush=True)

    def _finish_logs(self) -> None:
        """Wait a little for the rest of the log."""
        for thread in self._logs.values():
            thread.join(timeout=10)

    def _refused(self, error: Exception) -> Refusal:
        status = getattr(error, "status", 0)
        said = f"the Kubernetes API answered {status or 'nothing'} to the TrainJob {self.name} ({_said(error)})"
        if status in (401, 403):
            return Refusal(
                f"{said}: let the stages' service account manage TrainJobs, as deploy/watcher/service-account.yaml does"
            )
        if status == 404:
            return Refusal(f"{said}: install Kubeflow Trainer on the cluster")
        if 400 <= status < 500:
            return Refusal(f"{said}: correct trainer and stages in the profile")
        return Unavailable(f"{said}: start the run again")


def _named(manifest: Mapping[str, Any], name: str, piece: Piece) -> dict[str, Any]:
    """Return the job with its name, its arguments, and the MLflow run that Kubeflow's plugin may have made for this task."""
    job = json.loads(json.dumps(manifest))
    job["metadata"] = job.get("metadata", {}) | {"name": name, "annotations": {RUN: piece.run}}
    trainer = job["spec"]["trainer"]
    trainer["args"] = [json.dumps(vars(piece))]
    mlflow = MlflowSettings()
    plugin = {"MLFLOW_RUN_ID": mlflow.run_id, "MLFLOW_EXPERIMENT_ID": mlflow.experiment_id}
    there = {variable["name"] for variable in trainer["env"]}
    trainer["env"] += [{"name": key, "value": value} for key, value in plugin.items() if value and key not in there]
    return job


def _ended(job: Mapping[str, Any]) -> bool:
    return bool(_condition(job, "Complete") or _condition(job, "Failed"))


def _condition(job: Mapping[str, Any], kind: str) -> str:
    """Return why the job is in this state, or an empty string if it is not."""
    for condition in job.get("status", {}).get("conditions", ()):
        if condition["type"] == kind and condition["status"] == "True":
            said = [condition.get("reason"), condition.get("message")]
            return ": ".join(part for part in said if part) or kind
    return ""


def _state(job: Mapping[str, Any], pods: list[Any], nodes: int) -> str:
    if reason := _condition(job, "Suspended"):
        return f"suspended ({reason})"
    return f"{sum(pod.status.phase == 'Running' for pod in pods)} of {nodes} nodes run"


def _number(pod: Any) -> int:
    """Return the number of a pod's node, counted from 0."""
    return int((pod.metadata.labels or {}).get("batch.kubernetes.io/job-completion-index", 0))


def _first_to_fail(pods: list[Any]) -> tuple[Any, Any] | None:
    """Return the pod whose container failed first and how it ended, or None if none failed.

    A container may be started again in place: what it ended with before counts, since the processes of the other nodes wait for the old one.
    """
    ended = [
        (pod, state.terminated)
        for pod in pods
        for container in pod.status.container_statuses or ()
        for state in (container.state, container.last_state)
        if container.name == NODE and state and state.terminated and state.terminated.exit_code
    ]
    return min(ended, key=lambda one: one[1].finished_at, default=None)


def _failure(pod: Any, end: Any, nodes: int) -> Exception:
    """Return the error of a node as one of this process."""
    message = (end.message or "").strip()
    if refusal := refusal_from(message):
        return refusal
    said = message or f"exit status {end.exit_code}"
    reason = f" ({end.reason})" if end.reason not in (None, "Error") else ""
    return NodeFailed(
        f"node {_number(pod) + 1} of {nodes} failed with {said}{reason}, in the pod {pod.metadata.name} on {pod.spec.node_name}: "
        "a new run goes on from the last checkpoint"
    )


def _said(error: Exception) -> str:
    """Return the message in the API's answer, or the error's own."""
    try:
        return str(json.loads(getattr(error, "body", "") or "")["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(str(getattr(error, "reason", "") or error).split())


@contextlib.contextmanager
def _cancelled_by_sigterm(label: str) -> Iterator[None]:
    """Raise StageFailed on SIGTERM, with which Kubernetes ends a pod, so that the block can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(number: int, frame: FrameType | None) -> None:
        raise StageFailed(
            f"{label} was ended by SIGTERM, and so is its TrainJob: a new run goes on from the last checkpoint"
        )

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: str) -> None:
    """Run a stage as one of the job's nodes, and leave an error where Kubernetes reads it."""
    from components.lib.stage.run import Opened

    piece = Piece(**json.loads(arguments))
    try:
        opened = Opened(
            declared_stages()[piece.stage],
            piece.run,
            parse_recipe(piece.recipe),
            piece.variant,
            piece.references,
            Store.from_environment(),
        )
        if opened.found is None:
            opened.perform(StageEvents(piece.label))
    except BaseException as error:
        _leave(of_machine(error) or error)
        raise


def _leave(error: BaseException) -> None:
    with contextlib.suppress(OSError):
        if TERMINATION.exists():
            TERMINATION.write_text(f"{type(error).__name__}: {error}"[:4000])


if __name__ == "__main__":
    main(sys.argv[1])
