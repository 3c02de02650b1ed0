"""The pipeline as the YAML that Kubeflow takes.

    text = compile_pipeline(recompress, profile)

The same pipeline runs on this machine and on a cluster; what differs is what its tasks are dressed in.
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


def dressed(graph: GraphComponent, dress: Callable[[PipelineTask], object]) -> GraphComponent:
    """The same pipeline, `dress` called with each of its tasks, the exit handler's among them."""

    @functools.wraps(graph.pipeline_func)
    def in_dress(*inputs: object) -> object:
        outputs = graph.pipeline_func(*inputs)
        for task in pipeline_context.Pipeline.get_default_pipeline().tasks.values():
            dress(task)
        return outputs

    return pipeline(in_dress, name=graph.name, description=graph.description)


def for_cluster(graph: GraphComponent, profile: Profile, mutable: bool = False) -> GraphComponent:
    """The pipeline in the profile's image, each task with what the profile gives its stage.

    Raises:
        Refusal: the profile names no image, or one by a tag and `mutable` does not allow it.
    """
    image = profile.pinned_image(mutable)

    def dress(task: PipelineTask) -> None:
        task.set_container_image(image)
        profile.dress(task)

    return dressed(graph, dress)


def compile_pipeline(graph: GraphComponent, profile: Profile, mutable: bool = False) -> str:
    """The pipeline's YAML: PipelineSpec, then PlatformSpec. Raises what `for_cluster` raises."""
    with tempfile.TemporaryDirectory(prefix="espalier-compile-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(for_cluster(graph, profile, mutable), str(path))
        return path.read_text()


def digest(text: str) -> str:
    """sha256 of a compiled pipeline (hex)."""
    return hashlib.sha256(text.encode()).hexdigest()
