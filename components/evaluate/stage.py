"""Evaluate: measure every model of the run in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.lib.recipe.schema import Recipe
from components.lib.stage.declaration import MODEL, Job, References, Stage, reads


@dataclass(frozen=True)
class Inputs:
    """The models by name, the texts by their names in `evaluate.perplexity`, the task files by their place in `evaluate.tasks`."""

    models: Mapping[str, Path] = reads(*MODEL)
    texts: Mapping[str, Path] = reads()
    tasks: Mapping[str, Path] = reads()


def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """Measure."""
    from components.evaluate.evaluate import evaluate

    evaluate(
        inputs.models,
        inputs.texts,
        inputs.tasks,
        evaluate=recipe.evaluate,
        out=job.out,
        journal=job.journal,
        model_digests=job.digests["models"],
        text_digests=job.digests["texts"],
    )


def _complete(given: References, recipe: Recipe) -> References:
    """Add the texts and the task files, and drop a champion that is equal to the candidate.

    A candidate is not compared with itself, so an evaluation stays valid when its candidate becomes champion.
    """
    models = given["models"]
    assert isinstance(models, Mapping)
    digest = {name: reference.rpartition("@")[2] for name, reference in models.items()}
    # A Kubeflow parameter keeps no order: the dense model and the candidate come first.
    order = sorted(models, key=lambda name: (name != "dense", name != "candidate", name))
    others = {name: models[name] for name in order if name != "champion" or digest[name] != digest["candidate"]}
    texts = {name: text.path or "" for name, text in recipe.evaluate.perplexity.items()}
    tasks = {str(place): task for place, task in enumerate(recipe.evaluate.task_files)}
    return {"models": others, "texts": texts, "tasks": tasks}


def _unused(recipe: Recipe) -> tuple[str, ...]:
    """Without tasks, lm-eval and its version change nothing; nor does what is for servers, if none is measured."""
    tasks = ("components.evaluate.zero_shot", "components.evaluate.continuations", "components.lib.tasks.load")
    return (
        *(() if recipe.evaluate.tasks or recipe.evaluate.continuations else tasks),
        *(() if recipe.evaluate.speed.backend == "vllm" else ("components.evaluate.served", "components.lib.vllm")),
    )


STAGE = Stage("evaluate", Inputs, work, sections=("evaluate",), complete=_complete, unused=_unused)
