"""Runners of the pipeline: processes of this machine, containers of this machine, or a Kubeflow cluster.

The pipeline is the same in each of them. An output is complete if its manifest is in the store, and a run is complete if its
report is: success requires the report, and a runner's exit code is not trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rich.console import Console


class Runner(Protocol):
    """Runs the pipeline in one kind of place."""

    @property
    def embeds(self) -> bool:
        """Return True if the pipeline can reach the embedded services."""

    def services(self, home: Path) -> AbstractContextManager[Mapping[str, str]]:
        """Start or find the store and MLflow for the block, and return the environment that names them."""

    def run(self, arguments: Mapping[str, str], log: Path, console: Console) -> None:
        """Run the pipeline to its end, showing its progress.

        Raises:
            Refusal: a stage found an error that the user can correct.
            StageFailed: a stage broke.
        """


class CellNews(NamedTuple):
    """News of a cell of a comparison: a stage of it began, or it ended."""

    run: str
    """The label of the cell's run."""
    stage: str = ""
    """The stage that began; empty if the cell ended."""
    error: Exception | None = None
    """Why it failed."""


@runtime_checkable
class ParallelRunner(Protocol):
    """A runner that runs several cells of a comparison side by side."""

    def run_cells(self, label: str, release: str, recipes: Mapping[str, str], console: Console) -> Iterator[CellNews]:
        """Run the cells, and yield their news until each has ended.

        Args:
            label: the comparison's label.
            release: the release's reference.
            recipes: the YAML of each cell's recipe, by the label of its run.
            console: shows where the cells run.
        """


def task_names(pipeline: Any) -> set[str]:
    """Return the names of the pipeline's tasks, including those inside its exit handler."""
    spec = pipeline.pipeline_spec
    dags = {name: component.dag for name, component in spec.components.items() if component.HasField("dag")}
    tasks = (task for dag in (spec.root.dag, *dags.values()) for task in dag.tasks.items())
    return {name for name, task in tasks if task.component_ref.name not in dags}
