"""Run the pipeline on a Kubeflow cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console

from components.lib.errors import Refusal, StageFailed
from components.lib.stage.events import EVENT
from components.lib.store.runs import failure
from components.lib.store.store import Store
from pipeline.runners.progress import displayed
from pipeline.runners.runner import task_names

if TYPE_CHECKING:
    from pipeline.kubeflow.profile import Profile


@dataclass(frozen=True)
class KubeflowRunner:
    """A cluster with Kubeflow Pipelines."""

    profile: Profile
    mutable: bool = False
    """Whether the image may be named by a tag."""
    pause: float = 5.0
    """Seconds between two requests for the run's state."""
    embeds: ClassVar[bool] = False

    @contextmanager
    def services(self, home: Path) -> Iterator[Mapping[str, str]]:
        """Return the environment that names the profile's store. No service is embedded: a cluster cannot reach this machine's loopback."""
        from pipeline.kubeflow.profile import variables

        self.profile.pinned_image(self.mutable)
        yield variables(self.profile, os.environ)

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        """Upload the pipeline if the server does not have it, start a run of it, and follow it to its end."""
        from pipeline.kubeflow.client import KubeflowClient, failed_task, succeeded
        from pipeline.kubeflow.compile import compile_pipeline
        from pipeline.recompress import recompress

        server = KubeflowClient(self.profile.kubeflow)
        version = server.upload(recompress.name, compile_pipeline(recompress, self.profile, self.mutable))
        run = server.start(version, arguments["run"], arguments, self.profile)
        console.print(f"On Kubeflow: {run.address}", highlight=False, soft_wrap=True)
        tasks = task_names(recompress)
        with displayed(log, len(tasks), console) as display:

            def show(task: str, event: str, seconds: float | None) -> None:
                # The server reports its drivers and handlers too.
                if task in tasks:
                    shown = {"stage": task, "event": event, "seconds": seconds}
                    display.write(f"{EVENT}{json.dumps(shown)}\n")

            ended = server.follow(run, show, self.pause)
        if not succeeded(ended):
            state = f"{failed_task(ended) or 'the run'} {str(ended.state).lower()}"
            raise _failure(arguments["run"], state, run.address)


def _failure(label: str, state: str, address: str) -> Refusal | StageFailed:
    """Return the error that the failed stage left in the store, or else the state that Kubeflow reports."""
    left = failure(label, Store.from_environment())
    if left and left.lasting:
        return Refusal(left.reason)
    return StageFailed(f"{f'{left.stage}: {left.reason}' if left else state} ({address})")
