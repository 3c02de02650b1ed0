"""TRSP's choice of layers (arXiv 2505.18232): learn one gate a layer, and let the layers of the smallest gates go.

A derivative near a gate of 1 does not tell what a removal costs, so the gates name a shortlist and one measurement of each of
its removals decides: the cost of a few forward passes a round, against a pass for every layer in a full greedy search.
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
from components.lib.transformer.gates import blocks, bypassed
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import Selection

if TYPE_CHECKING:
    from components.lib.methods.trsp import Trsp


def choose(settings: Trsp, model: PreTrainedModel, windows: Tensor, *, journal: Journal, out: Path | None) -> Selection:
    """Choose layers, and leave `trajectory.jsonl` and `gates.svg` in `out`.

    Iterative: after each round the least needed layer goes, and the gates of the others are learned on from where they stand.
    One-shot: all steps are taken at once, and the layers go by the gates they end with.

    `scores["gate"]` is each layer's gate when it went, or at the end; `scores["perplexity"]` the perplexity without it when it
    was last measured, and 0 where it never was on a shortlist.
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
    """What is known so far: the gates, where they have been, what was measured and what went."""

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
        """Learn the gates of the layers that are left on, from where they stand, for one round."""
        first = len(self.trajectory)
        steps = self.steps // self.rounds
        learning = learn_gates(
            self.model, self.windows, self.gates, self.order, self.settings, steps=steps, first=first
        )
        for step, (loss, gates) in enumerate(learning, first + 1):
            # A layer that went keeps the gate it went with in the scores; in the trajectory it is at 0.
            kept = self.gates[self.order]
            self.gates = gates.clone()
            self.gates[self.order] = kept
            self.trajectory.append(Step(round=number, step=step, gates=gates.tolist()))
            self.journal.metrics({"lm": loss}, step)
            self.journal.progress(step, self.steps, lm=loss)

    def remove(self) -> None:
        """Let go the layer of the smallest gate; with a shortlist, the one of them that costs the least perplexity."""
        left = [layer for layer in range(len(self.gates)) if layer not in self.order]
        smallest = sorted(left, key=lambda layer: self.gates[layer].item())
        listed = smallest[: max(1, self.settings.shortlist)]
        if self.settings.shortlist > 0:
            for layer in listed:
                with bypassed(self.model, [*self.order, layer]):
                    self.perplexity[layer] = perplexity(self.model, self.measured, self.settings.batch_size)
            listed.sort(key=self.perplexity.__getitem__)
        self.order.append(listed[0])
