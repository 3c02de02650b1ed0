"""Kubeflow Pipelines as this machine sees it: upload a pipeline once, start a run of it, follow the run to its end.

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
"""What a follower is told of a task's state. A failed task is left to the end of the run: it may be tried again."""

PATIENCE = 600.0
"""Seconds that a server may be away while a run is followed; the run does not mind."""

_UNREACHABLE = (urllib3.exceptions.HTTPError, TimeoutError, OSError)

TaskSink = Callable[[str, str, float | None], None]
"""Takes a task's name, what became of it (opened, done or skipped) and how many seconds it took."""


@dataclass(frozen=True)
class Version:
    """An uploaded version of a pipeline."""

    pipeline_id: str
    version_id: str
    name: str
    """The digest of its YAML, shortened."""


@dataclass(frozen=True)
class Run:
    """A run on the server."""

    run_id: str
    address: str
    """Where a person looks at it."""


class _KfpClient(kfp.Client):
    """kfp's client, which says at once what is wrong: the original asks for half a minute, and logs each traceback."""

    def get_kfp_healthz(self, sleep_duration: int = 5) -> V2beta1GetHealthzResponse:
        """Ask once."""
        return self._healthz_api.healthz_service_get_healthz()


class KubeflowClient:
    """A Kubeflow Pipelines server."""

    def __init__(self, server: Server) -> None:
        """Connect.

        The token in KF_PIPELINES_TOKEN goes along where it is set.

        Raises:
            Unavailable: it does not answer, or not to this person.
        """
        self.server = server
        settings = KubeflowSettings()
        self.host = server.host or settings.endpoint or ""
        with self.asked(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.client = _KfpClient(host=self.host or None, existing_token=settings.token)
            self.client.get_kfp_healthz()

    def upload(self, name: str, text: str) -> Version:
        """Upload a compiled pipeline as a version that its digest names; one that is there already is taken.

        Raises:
            Unavailable: the server does not take it.
        """
        version = digest(text)[:16]
        with self.asked(), tempfile.TemporaryDirectory(prefix="espalier-compile-") as folder:
            path = Path(folder) / "pipeline.yaml"
            path.write_text(text)
            pipeline_id = self.client.get_pipeline_id(name)
            if pipeline_id is None:
                # The first upload makes the pipeline, and a version with the pipeline's name; ours is the one below.
                made = self.client.upload_pipeline(str(path), name, namespace=self.server.namespace)
                pipeline_id = made.pipeline_id
            found = self._version(pipeline_id, version)
            if found is None:
                made = self.client.upload_pipeline_version(str(path), version, pipeline_id=pipeline_id)
                found = made.pipeline_version_id
            return Version(pipeline_id, found, version)

    def start(self, version: Version, label: str, arguments: Mapping[str, str], profile: Profile) -> Run:
        """Start a run of the version.

        Raises:
            Unavailable: the server does not take it.
        """
        with self.asked():
            experiment = self.client.create_experiment(self.server.experiment, namespace=self.server.namespace)
            run = self.client.run_pipeline(
                experiment.experiment_id,
                label,
                params=dict(arguments),
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                pipeline_root=profile.pipeline_root,
                service_account=profile.service_account,
            )
        return Run(run.run_id, self.address(run.run_id))

    def address(self, run_id: str) -> str:
        """Where a person looks at the run."""
        ui = self.server.ui or KubeflowSettings().ui_endpoint or self.host or self.client._existing_config.host
        return f"{ui.rstrip('/')}/#/runs/details/{run_id}"

    def follow(self, run: Run, on_event: TaskSink, pause: float = 5.0) -> V2beta1Run:
        """Wait for the run's end, telling of each task that begins or ends, and return the run as it ended.

        Args:
            run: what `start` returned.
            on_event: called once with each thing that a task comes to.
            pause: seconds between two looks.

        Raises:
            Unavailable: the server has been away for ten minutes; the run goes on.
        """
        told: set[tuple[str, str]] = set()
        answered = time.monotonic()
        while True:
            try:
                with self.asked(f"; the run goes on: {run.address}"):
                    seen = self.client.get_run(run.run_id)
                answered = time.monotonic()
            except Unavailable:
                if time.monotonic() - answered > PATIENCE:
                    raise
            else:
                for name, event, seconds in _events(seen):
                    if (name, event) not in told:
                        told.add((name, event))
                        on_event(name, event, seconds)
                if seen.state in ENDED:
                    return seen
            time.sleep(pause)

    def _version(self, pipeline_id: str, name: str) -> str | None:
        """The id of the pipeline's version with this name, or None."""
        predicates = {"predicates": [{"operation": "EQUALS", "key": "display_name", "string_value": name}]}
        found = self.client.list_pipeline_versions(pipeline_id, filter=json.dumps(predicates)).pipeline_versions or []
        return next((one.pipeline_version_id for one in found if one.display_name == name), None)

    @contextlib.contextmanager
    def asked(self, more: str = "") -> Iterator[None]:
        """Put what the server or the network says into a sentence, and keep kfp's own words to itself."""
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
    """The name of the task that the run failed in, as far as the server says; empty where it does not."""
    failed = [task.display_name for task in _tasks(run) if task.state == "FAILED" and not task.child_tasks]
    return failed[0] if failed else ""


def succeeded(run: V2beta1Run) -> bool:
    """Whether the run ended well."""
    return run.state == "SUCCEEDED"


def _events(run: V2beta1Run) -> Iterator[tuple[str, str, float | None]]:
    for task in _tasks(run):
        if task.state in EVENTS:
            over = task.state != "RUNNING" and task.start_time and task.end_time
            seconds = (task.end_time - task.start_time).total_seconds() if over else None
            yield task.display_name, EVENTS[task.state], seconds


def _tasks(run: V2beta1Run) -> list[V2beta1PipelineTaskDetail]:
    return (run.run_details.task_details if run.run_details else None) or []


def _said(error: ApiException) -> str:
    """What the server says, out of its JSON where it is JSON."""
    try:
        body: Any = json.loads(error.body or "")
        return str(body.get("message") or body.get("error") or error.reason)
    except (ValueError, AttributeError):
        return str(error.reason)
