"""A client of Kubeflow Pipelines: upload a pipeline once, start a run of it, follow the run to its end.

server = KubeflowClient(profile.kubeflow)
version = server.upload("recompress", text)
run = server.start(version, "a label", arguments, profile)
server.follow(run, on_event)
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp
import urllib3
from kfp_server_api import ApiException, V2beta1GetHealthzResponse, V2beta1PipelineTaskDetail, V2beta1Run

from components.lib.errors import Unavailable
from components.lib.settings import KubeflowSettings
from pipeline.kubeflow.compile import digest
from pipeline.kubeflow.profile import Profile, Server

ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
EVENTS = {"RUNNING": "opened", "SUCCEEDED": "done", "SKIPPED": "skipped"}
"""The event of each task state. FAILED has none: the task may be retried, so a failure counts only at the end of the run."""

PATIENCE = 600.0
"""Seconds that a server may be unreachable while a run is followed; the run itself continues."""

_UNREACHABLE = (urllib3.exceptions.HTTPError, TimeoutError, OSError)

TaskSink = Callable[[str, str, float | None], None]
"""Takes a task's name, its event (opened, done or skipped) and the seconds it took, None while it runs."""


@dataclass(frozen=True)
class PipelineVersion:
    """An uploaded version of a pipeline."""

    pipeline_id: str
    version_id: str
    name: str
    """The digest of its YAML, shortened."""


@dataclass(frozen=True)
class PipelineRun:
    """A run on the server."""

    run_id: str
    address: str
    """Its page in the web interface."""
    arguments: Mapping[str, Any]


class _KfpClient(kfp.Client):
    """kfp's client, which reports an error at once: the original retries for half a minute and logs each traceback."""

    def get_kfp_healthz(self, sleep_duration: int = 5) -> V2beta1GetHealthzResponse:
        """Ask for the server's health once, without retries."""
        return self._healthz_api.healthz_service_get_healthz()


class KubeflowClient:
    """A Kubeflow Pipelines server."""

    def __init__(self, server: Server) -> None:
        """Connect.

        Send the token in KF_PIPELINES_TOKEN if it is set.

        Raises:
            Unavailable: the server does not answer, or does not accept the token.
        """
        self.server = server
        settings = KubeflowSettings()
        self.host = server.host or settings.endpoint or ""
        with self.asked(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.client = _KfpClient(host=self.host or None, existing_token=settings.token)
            self.client.get_kfp_healthz()

    def upload(self, name: str, text: str) -> PipelineVersion:
        """Upload a compiled pipeline as a version named after its digest, or return the version that is there already.

        Raises:
            Unavailable: the server does not take it.
        """
        version = digest(text)[:16]
        with self.asked(), tempfile.TemporaryDirectory(prefix="espalier-compile-") as folder:
            path = Path(folder) / "pipeline.yaml"
            path.write_text(text)
            pipeline_id = self.client.get_pipeline_id(name)
            if pipeline_id is None:
                # The first upload makes the pipeline and a version with the pipeline's name; our version is uploaded below.
                made = self.client.upload_pipeline(str(path), name, namespace=self.server.namespace)
                pipeline_id = made.pipeline_id
            found = self._version(pipeline_id, version)
            if found is None:
                made = self.client.upload_pipeline_version(str(path), version, pipeline_id=pipeline_id)
                found = made.pipeline_version_id
            return PipelineVersion(pipeline_id, found, version)

    def start(
        self, version: PipelineVersion, label: str, arguments: Mapping[str, Any], profile: Profile
    ) -> PipelineRun:
        """Start a run of the version.

        Raises:
            Unavailable: the server does not take it.
        """
        with self.asked():
            run = self.client.run_pipeline(
                self.experiment_id(),
                label,
                params=dict(arguments),
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                pipeline_root=profile.pipeline_root,
                service_account=profile.service_account,
            )
        return PipelineRun(run.run_id, self.address(run.run_id), arguments)

    def running(self, label: str) -> PipelineRun | None:
        """Return the newest run with this label if it has not ended.

        Raises:
            Unavailable: the server does not answer.
        """
        with self.asked():
            runs = self.client.list_runs(
                experiment_id=self.experiment_id(), sort_by="created_at desc", filter=_equals(label)
            ).runs
        newest = next((run for run in runs or () if run.display_name == label), None)
        if newest is None or newest.state in ENDED:
            return None
        return PipelineRun(newest.run_id, self.address(newest.run_id), newest.runtime_config.parameters)

    def experiment_id(self) -> str:
        """Return the id of the profile's experiment, which is made if it is missing."""
        experiment = self.client.create_experiment(self.server.experiment, namespace=self.server.namespace)
        return str(experiment.experiment_id)

    def address(self, run_id: str) -> str:
        """Return the run's page in the web interface."""
        ui = self.server.ui or KubeflowSettings().ui_endpoint or self.host or self.client._existing_config.host
        return f"{ui.rstrip('/')}/#/runs/details/{run_id}"

    def follow(self, run: PipelineRun, on_event: TaskSink, pause: float = 5.0) -> V2beta1Run:
        """Wait until the run ends, report each task that begins or ends, and return the run in its final state.

        Args:
            run: the run that `start` returned.
            on_event: called once for each event of a task.
            pause: seconds between two requests for the run's state.

        Raises:
            Unavailable: the server has not answered for ten minutes; the run goes on.
        """
        reported: set[tuple[str, str]] = set()
        for seen in self.looks(run, pause):
            for name, event, seconds in _events(seen):
                if (name, event) not in reported:
                    reported.add((name, event))
                    on_event(name, event, seconds)
        return seen

    def looks(self, run: PipelineRun, pause: float = 5.0) -> Iterator[V2beta1Run]:
        """Yield the run every `pause` seconds, the last time in its final state.

        Raises:
            Unavailable: as `follow`.
        """
        answered = time.monotonic()
        while True:
            try:
                with self.asked(f"; the run goes on: {run.address}"):
                    seen = self.client.get_run(run.run_id)
            except Unavailable:
                if time.monotonic() - answered > PATIENCE:
                    raise
            else:
                yield seen
                if seen.state in ENDED:
                    return
                answered = time.monotonic()
            time.sleep(pause)

    def _version(self, pipeline_id: str, name: str) -> str | None:
        """Return the id of the pipeline's version with this name, or None."""
        found = self.client.list_pipeline_versions(pipeline_id, filter=_equals(name)).pipeline_versions or []
        return next((one.pipeline_version_id for one in found if one.display_name == name), None)

    @contextlib.contextmanager
    def asked(self, more: str = "") -> Iterator[None]:
        """Turn an error of the server or the network into an Unavailable of one sentence, and suppress what kfp prints."""
        where = f"Kubeflow Pipelines at {self.host or 'the address that the kubeconfig gives'}"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except ApiException as error:
            cure = "set KF_PIPELINES_TOKEN to a valid token, or ask for the right" if error.status in {401, 403} else ""
            said = _said(error)
            raise Unavailable(f"{where} answered {error.status} ({said}): {cure or 'see its logs'}{more}") from error
        except _UNREACHABLE as error:
            said = " ".join(str(error).split())
            raise Unavailable(
                f"{where} does not answer ({said}): correct KF_PIPELINES_ENDPOINT or the profile's kubeflow.host{more}"
            ) from error


def failed_task(run: V2beta1Run) -> str:
    """Return the name of the task that failed, or an empty string if the server does not report one."""
    failed = [task.display_name for task in _tasks(run) if task.state == "FAILED" and not task.child_tasks]
    return failed[0] if failed else ""


def succeeded(run: V2beta1Run) -> bool:
    """Return True if the run succeeded."""
    return run.state == "SUCCEEDED"


def _equals(name: str) -> str:
    """Return the filter for what is displayed under this name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "string_value": name}]})


def _events(run: V2beta1Run) -> Iterator[tuple[str, str, float | None]]:
    for task in _tasks(run):
        if task.state in EVENTS:
            over = task.state != "RUNNING" and task.start_time and task.end_time
            seconds = (task.end_time - task.start_time).total_seconds() if over else None
            yield task.display_name, EVENTS[task.state], seconds


def _tasks(run: V2beta1Run) -> list[V2beta1PipelineTaskDetail]:
    return (run.run_details.task_details if run.run_details else None) or []


def _said(error: ApiException) -> str:
    """Return the message in the server's answer, or the HTTP reason if the answer is not JSON."""
    try:
        body: Any = json.loads(error.body or "")
        return str(body.get("message") or body.get("error") or error.reason)
    except (ValueError, AttributeError):
        return str(error.reason)
