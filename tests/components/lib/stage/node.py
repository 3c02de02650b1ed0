"""A node of a job as a process of this machine, and the stage that it runs. It imports little: every process of every node imports it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from components.lib.errors import Refusal
from components.lib.recipe.schema import Recipe
from components.lib.stage import nodes
from components.lib.stage.declaration import Job, Stage, reads
from components.lib.training import ranks


@dataclass(frozen=True)
class Inputs:
    """The input of the stage that the nodes run here."""

    model: Path = reads("notes.json")


def count(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """A work that all processes of all nodes share: the first one leaves how many there are."""
    counted = ranks.summed(torch.ones(()))
    job.journal.metrics({"loss": counted.item()}, 1)
    if (inputs.model / "notes.json").read_text() == "refuse" and ranks.index() == 1:
        raise Refusal("lower it")
    ranks.wait()
    if ranks.first():
        (job.out / "processes").write_text(str(int(counted)))


STAGE = Stage("lora_rft", Inputs, count, sections=("recover",), shared=True, resumes=True)


def node(folder: Path, environment: Mapping[str, str], arguments: list[str]) -> None:
    """Be a node: the container of a pod."""
    os.environ |= environment
    folder.mkdir()
    nodes.TERMINATION = folder / "termination-log"
    nodes.TERMINATION.touch()
    nodes.declared_stages = lambda: {"lora_rft": STAGE}
    nodes.main(*arguments)
