"""Compile the pipeline to the YAML that Kubeflow takes.

    text = compile_pipeline(recompress, profile)

The same pipeline runs on this machine and on a cluster; only the image and the resources of its tasks differ.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from kfp import compiler
from kfp.dsl import PipelineTask, pipeline, pipeline_context
from kfp.dsl.graph_component import GraphComponent

from pipeline.kubeflow.profile import Profile


def configured(graph: GraphComponent, configure: Callable[[PipelineTask], object]) -> GraphComponent:
    """Return the same pipeline with `configure` applied to each of its tasks, the exit handler's included."""

    @functools.wraps(graph.pipeline_func)
    def configured_pipeline(*inputs: object) -> object:
        outputs = graph.pipeline_func(*inputs)
        for task in pipeline_context.Pipeline.get_default_pipeline().tasks.values():
            configure(task)
        return outputs

    return pipeline(configured_pipeline, name=graph.name, description=graph.description)


def configured_for_cluster(graph: GraphComponent, profile: Profile, mutable: bool = False) -> GraphComponent:
    """Return the pipeline in the profile's image, each task with the resources that the profile gives its stage.

    A pipeline inside of it is left as it is: configure that one first.

    Raises:
        Refusal: the profile names no image, or names one by a tag and `mutable` is False.
    """
    image = profile.pinned_image(mutable)

    def configure(task: PipelineTask) -> None:
        if task.container_spec is not None:
            task.set_container_image(image)
            profile.configure(task)

    return configured(graph, configure)


def compile_pipeline(graph: GraphComponent, profile: Profile, mutable: bool = False) -> str:
    """Return the pipeline's YAML: PipelineSpec, then PlatformSpec. Raises what `configured_for_cluster` raises."""
    with tempfile.TemporaryDirectory(prefix="espalier-compile-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(configured_for_cluster(graph, profile, mutable), str(path))
        return path.read_text()


def digest(text: str) -> str:
    """Return the sha256 of a compiled pipeline (hex)."""
    return hashlib.sha256(text.encode()).hexdigest()
