"""Where a run happens: in processes here, in containers here, or on Kubeflow.

The pipeline is the same everywhere, and so is what counts as done: an output is there when its manifest is in the store, and
a run is over when its report is. A runner that calls a lost exit code a success can therefore not make a run succeed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rich.console import Console

from components.lib.errors import Refusal, StageFailed
from components.lib.stage.events import EVENT
from components.lib.stage.run import code_version
from components.lib.store.runs import failure
from components.lib.store.store import Store
from pipeline.cli.follow import Follower, following

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

    from pipeline.kubeflow.profile import Profile

IMAGE = "espalier:cpu"
"""What `make images` calls the image for CPUs."""

_HANDED_IN = ("AWS_", "MLFLOW_", "ESPALIER_", "HF_", "OMP_", "http_proxy", "https_proxy", "no_proxy")
"""How the names of variables begin that a stage in a container takes from here, in either case."""

_OF_THIS_MACHINE = {"ESPALIER_HOME", "ESPALIER_SCRATCH", "ESPALIER_IMAGE", "HF_HOME", "AWS_CA_BUNDLE"}
"""Variables that name what is not in the container."""


class Runner(Protocol):
    """A place where the pipeline runs."""

    @property
    def embeds(self) -> bool:
        """Whether the services may be the embedded ones."""

    def services(self, home: Path) -> AbstractContextManager[Mapping[str, str]]:
        """The store and MLflow as this machine reaches them, for the block: the environment that names them."""

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        """Run the pipeline to its end, showing its progress.

        Raises:
            Refusal: a stage found something the person can put right.
            StageFailed: a stage broke.
        """


@dataclass(frozen=True)
class Local:
    """Processes of this machine."""

    embeds: ClassVar[bool] = True

    def services(self, home: Path) -> AbstractContextManager[Mapping[str, str]]:
        """The embedded services, where the environment names no others."""
        from pipeline.services.embedded import services

        return services(home)

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        """Run each stage in a process of its own."""
        from kfp import local

        from pipeline.recompress import recompress

        _run_here(recompress, local.SubprocessRunner(use_venv=False), arguments, log, console)


@dataclass(frozen=True)
class Docker:
    """Containers of this machine."""

    image: str = IMAGE
    embeds: ClassVar[bool] = True

    def services(self, home: Path) -> AbstractContextManager[Mapping[str, str]]:
        """The embedded services, where the environment names no others: the containers share this machine's network."""
        return Local().services(home)

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        """Run each stage in a container of the image."""
        from kfp import local

        from pipeline.kubeflow.compile import dressed
        from pipeline.recompress import recompress

        options = self._engine(console)
        runner = local.DockerRunner(
            environment=container_environment(os.environ),
            network_mode="host",
            # What a stage leaves in the folder that it shares with this process is this person's.
            user=f"{os.getuid()}:{os.getgid()}",
            shm_size="1g",
            **options,
        )
        in_image = dressed(recompress, lambda task: task.set_container_image(self.image))
        _run_here(in_image, runner, arguments, log, console)

    def _engine(self, console: Console) -> dict[str, Any]:
        """Ask the engine for the image, and for its GPUs if it has any. Raises Refusal where either does not answer."""
        import docker

        try:
            client = docker.from_env()
            runtimes = client.info().get("Runtimes", {})
            image = client.images.get(self.image)
        except docker.errors.ImageNotFound:
            raise Refusal(
                f"the image {self.image} is not here: build it with `make images`, or name another with --image"
            ) from None
        except docker.errors.DockerException as error:
            raise Refusal(f"no Docker engine answers ({error}): start one, or run with --on local") from None
        if image.labels.get("espalier.code") != code_version(""):
            console.print(
                f"The image {self.image} was made from other sources than these: its outputs have other keys.",
                highlight=False,
            )
        gpus = docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])
        return {"device_requests": [gpus]} if "nvidia" in runtimes else {}


@dataclass(frozen=True)
class Kubeflow:
    """A cluster with Kubeflow Pipelines."""

    profile: Profile
    mutable: bool = False
    """Whether the image may be named by a tag."""
    pause: float = 5.0
    """Seconds between two looks at the run."""
    embeds: ClassVar[bool] = False

    @contextmanager
    def services(self, home: Path) -> Iterator[Mapping[str, str]]:
        """The store of the profile. Nothing is embedded: what answers on loopback no cluster reaches."""
        from pipeline.kubeflow.profile import variables

        self.profile.pinned_image(self.mutable)
        yield variables(self.profile, os.environ)

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        """Upload the pipeline where it is not there yet, start a run of it, and follow it to its end."""
        from pipeline.kubeflow import client as kubeflow
        from pipeline.kubeflow.compile import compile_pipeline
        from pipeline.recompress import recompress

        server = kubeflow.Kubeflow(self.profile.kubeflow)
        version = server.upload(recompress.name, compile_pipeline(recompress, self.profile, self.mutable))
        run = server.start(version, arguments["run"], arguments, self.profile)
        console.print(f"On Kubeflow: {run.address}", highlight=False, soft_wrap=True)
        tasks = _tasks(recompress)
        with following(log, len(tasks), console) as follower:

            def tell(task: str, event: str, seconds: float | None) -> None:
                # The server tells of drivers and handlers too.
                if task not in tasks:
                    return
                told = {"stage": task, "event": event, "seconds": seconds}
                follower.write(f"{EVENT}{json.dumps(told)}\n")

            ended = server.follow(run, tell, self.pause)
        if not kubeflow.succeeded(ended):
            _explain(
                arguments["run"], f"{kubeflow.failed_task(ended) or 'the run'} {str(ended.state).lower()}", run.address
            )


def container_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """What a container is told of this machine's environment: the services, their credentials and the proxies, no paths."""
    handed = {
        name: value
        for name, value in variables.items()
        if name.lower().startswith(tuple(start.lower() for start in _HANDED_IN))
        and name not in _OF_THIS_MACHINE
        and not name.endswith("_FILE")
    }
    # kfp decodes a container's output piece by piece, and fails where a piece ends inside a character: so there are none.
    return handed | {"PYTHONIOENCODING": "ascii:backslashreplace"}


def _run_here(pipeline: GraphComponent, runner: Any, arguments: Mapping[str, str], log: Path, console: Console) -> None:
    """Run the pipeline through kfp.local."""
    from kfp import local

    for name, value in arguments.items():
        # kfp.local puts the interpreter's path in the place of this word, wherever it stands in an argument.
        if "python3" in value:
            raise Refusal(f"the run's {name} holds the word 'python3', which kfp.local rewrites: use another name")
    # A folder of its own for each run, whose path holds no word that kfp.local rewrites; nothing in it outlives the run.
    with (
        tempfile.TemporaryDirectory(prefix="espalier-kfp-") as root,
        following(log, len(_tasks(pipeline)), console) as follower,
    ):
        local.init(runner=runner, pipeline_root=root)
        try:
            pipeline(**arguments)
        except Exception as error:
            # Beside the RuntimeError of a failed task, kfp raises many kinds where an earlier task left no output.
            raise _ended(follower, error, log) from error
    if follower.refused or follower.failed:
        raise _ended(follower, None, log)


def _ended(follower: Follower, error: Exception | None, log: Path) -> Refusal | StageFailed:
    if follower.refused:
        return Refusal(follower.refused)
    return StageFailed(f"{follower.failed or error} (the whole log: {log})")


def _explain(label: str, said: str, address: str) -> None:
    """Raise what the run's last failed stage left in the store; where it left nothing, what Kubeflow says."""
    left = failure(label, Store.from_environment())
    if left and left.lasting:
        raise Refusal(left.reason)
    raise StageFailed(f"{f'{left.stage}: {left.reason}' if left else said} ({address})")


def _tasks(pipeline: Any) -> set[str]:
    """The pipeline's tasks by name, those inside its exit handler counted, the handler itself not."""
    spec = pipeline.pipeline_spec
    dags = {name: component.dag for name, component in spec.components.items() if component.HasField("dag")}
    tasks = (task for dag in (spec.root.dag, *dags.values()) for task in dag.tasks.items())
    return {name for name, task in tasks if task.component_ref.name not in dags}
