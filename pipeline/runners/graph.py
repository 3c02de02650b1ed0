"""The tasks of the compiled pipeline: the stage of each, and the outputs that it reads.

Only `pipeline/recompress.py` connects the stages; the disk estimate and `espalier why` read the connections here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from kfp.dsl.graph_component import GraphComponent

from components.lib.stage.declaration import Stage, declared_stages


@dataclass(frozen=True)
class Output:
    """An output of another task."""

    task: str
    name: str


@dataclass(frozen=True)
class Task:
    """A task of the pipeline."""

    name: str
    stage: Stage[Any] | None
    """The stage with a key that it runs; None for a task without one, such as pin."""
    inputs: Mapping[str, Any]
    """A value, an `Output`, or a mapping of these, by the name of the parameter."""
    condition: frozenset[str] = frozenset()
    """The names of the tasks whose outputs decide whether it runs."""

    @property
    def variant(self) -> str:
        """Return the variant of the stage that it runs."""
        return str(self.inputs.get("kind", ""))

    @property
    def reads(self) -> set[str]:
        """The names of the tasks whose outputs it reads."""
        return _needs(self.inputs) | self.condition

    def resolved(self, outputs: Mapping[Output, str]) -> dict[str, Any]:
        """Return the inputs with the values of other tasks' outputs."""
        return {name: _resolved(value, outputs) for name, value in self.inputs.items()}


def tasks_of(pipeline: GraphComponent) -> list[Task]:
    """Return the tasks, each after those whose outputs it reads; tasks inside the exit handler count, the handler does not."""
    spec = MessageToDict(pipeline.pipeline_spec)
    components = spec["components"]
    stages = declared_stages()
    found: dict[str, Task] = {}
    dags = {"": spec["root"]["dag"]} | {name: one["dag"] for name, one in components.items() if "dag" in one}
    tasks = [(around, name, task) for around, dag in dags.items() for name, task in dag["tasks"].items()]
    conditions = {task["componentRef"]["name"]: _decides(task) for _, _, task in tasks}
    for around, name, task in tasks:
        component = task["componentRef"]["name"]
        if component not in dags:
            stage = stages.get(re.sub(r"-\d+$", "", component.removeprefix("comp-")).replace("-", "_"))
            found[name] = Task(name, stage, dict(_inputs(task)), conditions.get(around, frozenset()))
    return list(_in_order(found))


def _decides(task: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the tasks whose outputs a condition around other tasks compares; none for the exit handler."""
    given = task.get("inputs", {}).get("parameters", {}).values()
    return frozenset(_needs({str(index): _value(value) for index, value in enumerate(given)}))


def _inputs(task: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    given = task.get("inputs", {}).get("parameters", {})
    channels = {name: _value(value) for name, value in given.items()}
    for name, value in channels.items():
        if not name.startswith("pipelinechannel--"):
            yield name, _filled(value, channels)


def _value(given: Mapping[str, Any]) -> Any:
    if "taskOutputParameter" in given:
        output = given["taskOutputParameter"]
        return Output(output["producerTask"], output["outputParameterKey"])
    if "runtimeValue" in given:
        return given["runtimeValue"]["constant"]
    # An argument of the pipeline, which a nested one names after its channel.
    return Output("", given.get("componentInputParameter", "").removeprefix("pipelinechannel--"))


def _filled(value: Any, channels: Mapping[str, Any]) -> Any:
    """Replace kfp's placeholders inside a constant mapping by the outputs they stand for."""
    if isinstance(value, Mapping):
        return {name: _filled(part, channels) for name, part in value.items()}
    if isinstance(value, str) and value.startswith("{{$.inputs.parameters['"):
        return channels[value.removeprefix("{{$.inputs.parameters['").removesuffix("']}}")]
    return value


def _in_order(tasks: Mapping[str, Task]) -> Iterator[Task]:
    done: set[str] = set()
    while len(done) < len(tasks):
        ready = [task for name, task in tasks.items() if name not in done and task.reads <= done]
        if not ready:
            raise ValueError("the pipeline's tasks read each other's outputs in a circle")
        yield from ready
        done |= {task.name for task in ready}


def _needs(value: Any) -> set[str]:
    if isinstance(value, Output):
        return {value.task} - {""}
    return {name for part in value.values() for name in _needs(part)} if isinstance(value, Mapping) else set()


def _resolved(value: Any, outputs: Mapping[Output, str]) -> Any:
    if isinstance(value, Output):
        return outputs.get(value, "")
    return {name: _resolved(part, outputs) for name, part in value.items()} if isinstance(value, Mapping) else value
