"""TRSP's choice of layers (arXiv 2505.18232): learn one gate a layer, and remove the layers of the smallest gates.

A derivative near a gate of 1 does not show the cost of a removal, so the gates give a shortlist, and measuring each removal on it
decides: a few forward passes a round, against one for every layer in a full greedy search.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.methods import sample
from components.lib.methods.trsp.gates import learn_gates
from components.lib.methods.trsp.trajectory import Step, draw, save
from components.lib.training.journal import Journal
from components.lib.transformer.gates import blocks, removable
from components.lib.transformer.perplexity import perplexities_without
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from components.lib.methods.trsp import Trsp


def choose(settings: Trsp, model: PreTrainedModel, windows: Tensor, *, journal: Journal, out: Path | None) -> Selection:
    """Choose layers, and leave `trajectory.jsonl` and `gates.svg` in `out`.

    Iterative: remove the least needed layer after each round, and continue to learn the gates of the others. One-shot: take all
    steps at once, and remove layers by their final gates.

    `scores["gate"]` is each layer's gate at its removal, or at the end; `scores["perplexity"]` is the perplexity without it at its
    last measurement, and 0 if it never was on a shortlist.
    """
    count = settings.count(len(blocks(model)))
    search = _Search(model, windows, count, settings, journal)
    for number in range(count):
        if number == 0 or settings.strategy == "iterative":
            search.learn(number)
        search.remove()
    if out is not None:
        save(search.trajectory, out / "trajectory.jsonl")
        draw(search.trajectory, out / "gates.svg")
    scores = {"gate": tuple(search.gates.tolist()), "perplexity": tuple(search.perplexity)}
    return Selection.of_layers(settings.name, search.order, scores)


class _Search:
    """The state of the search: the gates and their trajectory, the measurements, and the removed layers."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, count: int, settings: Trsp, journal: Journal) -> None:
        self.model, self.windows, self.settings, self.journal = model, windows, settings, journal
        self.measured = sample(windows)
        self.rounds = count if settings.strategy == "iterative" else 1
        self.steps = settings.steps * count
        self.gates = torch.ones(len(blocks(model)))
        self.perplexity = [0.0] * len(self.gates)
        self.order: list[int] = []
        self.trajectory: list[Step] = []

    def learn(self, number: int) -> None:
        """Continue to learn the gates of the remaining layers for one round."""
        first = len(self.trajectory)
        steps = self.steps // self.rounds
        learning = learn_gates(
            self.model, self.windows, self.gates, self.order, self.settings, steps=steps, first=first
        )
        for step, (loss, gates) in enumerate(learning, first + 1):
            # In the scores a removed layer keeps its gate at the removal; in the trajectory it is 0.
            kept = self.gates[self.order]
            self.gates = gates.clone()
            self.gates[self.order] = kept
            self.trajectory.append(Step(round=number, step=step, gates=gates.tolist()))
            self.journal.metrics({"lm": loss}, step)
            self.journal.progress(step, self.steps, lm=loss)

    def remove(self) -> None:
        """Remove the layer of the smallest gate, or the layer of the shortlist that costs the least perplexity."""
        left = [layer for layer in removable(self.model) if layer not in self.order]
        smallest = sorted(left, key=lambda layer: self.gates[layer].item())
        listed = smallest[: max(1, self.settings.shortlist)]
        if self.settings.shortlist > 0:
            found = perplexities_without(self.model, self.measured, self.order, listed, self.settings.batch_size)
            for layer, value in found.items():
                self.perplexity[layer] = value
            listed.sort(key=self.perplexity.__getitem__)
        self.order.append(listed[0])
