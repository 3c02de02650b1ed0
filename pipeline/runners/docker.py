"""Run the pipeline in containers of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from components.lib.errors import Refusal
from components.lib.stage.code import code_of_everything
from pipeline.runners.local import LocalRunner, run_here

IMAGE = "espalier:cpu"
"""The name that `make images` gives to the image for CPUs."""

_PASSED_IN = ("AWS_", "MLFLOW_", "ESPALIER_", "HF_", "OMP_", "http_proxy", "https_proxy", "no_proxy")
"""Prefixes, in either case, of the environment variables that a container receives."""

_OF_THIS_MACHINE = {"ESPALIER_HOME", "ESPALIER_SCRATCH", "ESPALIER_IMAGE", "HF_HOME", "AWS_CA_BUNDLE"}
"""Variables that name paths of this machine, or the image itself: a container does not receive them."""


@dataclass(frozen=True)
class DockerRunner:
    """Containers of this machine."""

    image: str = IMAGE
    embeds: ClassVar[bool] = True

    def services(self, home: Path) -> AbstractContextManager[Mapping[str, str]]:
        """Start the embedded services unless the environment names others: the containers share this machine's network."""
        return LocalRunner().services(home)

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        """Run each stage in a container of the image."""
        from kfp import local

        from pipeline.kubeflow.compile import configured
        from pipeline.recompress import recompress

        options = self._engine(console)
        runner = local.DockerRunner(
            environment=container_environment(os.environ),
            network_mode="host",
            # The files that a stage writes into the shared folder then belong to this user.
            user=f"{os.getuid()}:{os.getgid()}",
            shm_size="1g",
            **options,
        )
        in_image = configured(recompress, lambda task: task.set_container_image(self.image))
        run_here(in_image, runner, arguments, log, console)

    def _engine(self, console: Console) -> dict[str, Any]:
        """Check that the engine has the image, and return its GPUs. Raises Refusal without an engine or the image."""
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
        if image.labels.get("espalier.code") != code_of_everything():
            console.print(
                f"The image {self.image} was made from other sources than these: its outputs have other keys.",
                highlight=False,
            )
        gpus = docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])
        return {"device_requests": [gpus]} if "nvidia" in runtimes else {}


def container_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the part of this machine's environment that a container receives: services, credentials and proxies, no paths."""
    passed = {
        name: value
        for name, value in variables.items()
        if name.lower().startswith(tuple(start.lower() for start in _PASSED_IN))
        and name not in _OF_THIS_MACHINE
        and not name.endswith("_FILE")
    }
    # kfp decodes a container's output in pieces and fails if a piece ends inside a character, so the output is ASCII.
    return passed | {"PYTHONIOENCODING": "ascii:backslashreplace"}
