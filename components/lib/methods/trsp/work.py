"""TRSP's choice of layers (arXiv 2505.18232): learn one gate a layer, and remove the layers of the smallest gates.

A derivative near a gate of 1 does not show the cost of a removal, so the gates give a shortlist, and measuring each removal on it
decides: a few forward passes a round, against one for every layer in a full greedy search. What is measured is the plain cut, or the
cut behind the transfer ridge, which a layer that a linear map can stand for passes better (`measure: fitted`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    `scores["gate"]` is each layer's gate at its removal, or at the end; the other score is the perplexity without it, or the divergence
    (`measure: fitted`), at its last measurement, and 0 if it never was on a shortlist.
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
    measured = "divergence" if settings.measure == "fitted" else "perplexity"
    scores = {"gate": tuple(search.gates.tolist()), measured: tuple(search.costs)}
    return Selection.of_layers(settings.name, search.order, scores)


class _Search:
    """The state of the search: the gates and their trajectory, the measurements, and the removed layers."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, count: int, settings: Trsp, journal: Journal) -> None:
        self.model, self.windows, self.settings, self.journal = model, windows, settings, journal
        self.measure = (
            _fitted(model, windows, settings) if settings.measure == "fitted" else _cut(model, windows, settings)
        )
        self.rounds = count if settings.strategy == "iterative" else 1
        self.steps = settings.steps * count
        self.gates = torch.ones(len(blocks(model)))
        self.costs = [0.0] * len(self.gates)
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
        """Remove the layer of the smallest gate, or the layer of the shortlist that costs the least."""
        left = [layer for layer in removable(self.model) if layer not in self.order]
        smallest = sorted(left, key=lambda layer: self.gates[layer].item())
        listed = smallest[: max(1, self.settings.shortlist)]
        if self.settings.shortlist > 0:
            for layer, cost in self.measure(self.order, listed).items():
                self.costs[layer] = cost
            listed.sort(key=self.costs.__getitem__)
        self.order.append(listed[0])


Measure = Callable[[Sequence[int], Sequence[int]], Mapping[int, float]]
"""Takes the layers that are removed and those that may be next; returns the cost of each of these."""


def _cut(model: PreTrainedModel, windows: Tensor, settings: Trsp) -> Measure:
    """Measure the perplexity of the plain cut."""
    measured = sample(windows)
    return lambda removed, listed: perplexities_without(model, measured, removed, listed, settings.batch_size)


def _fitted(model: PreTrainedModel, windows: Tensor, settings: Trsp) -> Measure:
    """Measure the divergence from the dense model after the transfer ridge, in nats a token, as the method seam does."""
    from components.lib.training.seam import divergence_after_fit, parted, record
    from components.lib.transfers.ridge import Ridge

    dense, strength = record(model, *parted(windows), settings.batch_size), Ridge().strength

    def without(layers: Sequence[int]) -> float:
        return divergence_after_fit(model, dense, sorted(layers), strength, settings.batch_size)

    return lambda removed, listed: {layer: without([*removed, layer]) for layer in listed}
