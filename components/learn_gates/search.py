"""Search how deep to cut: the deepest cut of the asked quality, or the shallowest of the asked speed or size.

The candidates are measured as they are after the transfer, without training. The search is a bisection: it relies on a deeper cut
being worse, faster and smaller, and every depth that it measured is in `search.json`.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.learn_gates.choose import select
from components.lib.depth import Depth, Point, Search, depths, holds, in_words
from components.lib.errors import Refusal
from components.lib.methods import MEASURED_TOKENS, Method
from components.lib.recipe.target import Target
from components.lib.training.journal import Journal
from components.lib.transformer.checkpoint import PrunableCheckpoint, load_model
from components.lib.transformer.device import best_device, raise_weights
from components.lib.transformer.gates import bypassed
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import Selection
from components.lib.transformer.surgery import cut_checkpoint, remaining
from components.lib.transformer.text import load_windows

HELD_OUT = 0.25
"""The part of the calibration windows that quality is measured on, at most MEASURED_TOKENS; the methods and the transfer see the others."""

REPEATS = 5
"""Timed passes of each model, after one to warm up."""

BATCH = 8


def search(
    release: Path, windows: Path, *, methods: Sequence[Method], target: Target, out: Path, journal: Journal
) -> None:
    """Leave the files of the selection at the depth that was found, and `search.json`.

    Args:
        release: the folder of the dense model's artifact.
        windows: the folder of the calibration windows.
        methods: the recipe's methods; their ratios are the deepest cut that is tried.
        target: what is asked for.
        out: the folder to fill.
        journal: takes the progress and each measured value.

    Raises:
        Refusal: no depth holds, or there are too few windows to hold some out.
    """
    drawn = load_windows(windows)
    held = min(int(HELD_OUT * len(drawn)), max(1, MEASURED_TOKENS // drawn.shape[1]))
    if not held:
        raise Refusal(
            f"calibration.samples is {len(drawn)}, and a target needs windows to measure on: set it to 4 or more"
        )
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        trials = _Trials(release / "model", drawn[:-held], drawn[-held:], target, Path(scratch), journal)
        possible = depths(methods, PrunableCheckpoint.open(release / "model"))
        found, points = bisect(possible, trials.point, target)
        for file in trials.folder(possible[found]).iterdir():
            shutil.move(file, out / file.name)
    safer = found - 1 if target.of_quality else found + 1
    Search(
        field=target.field,
        bound=target.bound,
        points=tuple(sorted(points, key=lambda point: point.part)),
        part=possible[found].part,
        next=possible[safer].ratios if 0 <= safer < len(possible) else None,
    ).save(out)


def bisect(possible: Sequence[Depth], measure: Callable[[Depth], Point], target: Target) -> tuple[int, list[Point]]:
    """Return the index of the depth that is wanted, and the points that were measured, at most log2(n) + 1.

    Args:
        possible: the depths, the least first.
        measure: measures one.
        target: of quality, the deepest that holds is wanted, else the least that holds.

    Raises:
        Refusal: the one that should hold the longest does not.
    """
    points: list[Point] = []
    # Every depth below `low` is on the side of the dense model; every one from `high` on is on the side of the deepest cut.
    low, high = 0, len(possible)
    while low < high:
        middle = (low + high) // 2
        points.append(measure(possible[middle]))
        if points[-1].holds == target.of_quality:
            low = middle + 1
        else:
            high = middle
    found = low - 1 if target.of_quality else low
    if not 0 <= found < len(possible):
        last = points[-1]
        end = "the least depth" if target.of_quality else "the deepest cut that the methods' ratios allow"
        raise Refusal(
            f"target.{target.field} {target.bound:g} does not hold at {end}, {in_words(last.ratios)}, where {last.value:.4g} was measured: "
            + (
                "ask for less quality, or name a transfer"
                if target.of_quality
                else "ask for less, or set larger ratios"
            )
        )
    return found, points


@dataclass
class _Trials:
    """Chooses and measures at one depth after another."""

    model: Path
    windows: Tensor
    """For the methods and the transfer."""
    held: Tensor
    target: Target
    scratch: Path
    journal: Journal
    measured: int = 0

    def __post_init__(self) -> None:
        self.dense = _loaded(self.model)
        self.base = self._quality(self.dense) if self.target.of_quality else 1.0

    def folder(self, depth: Depth) -> Path:
        """Return the folder of the selection's files at a depth."""
        return self.scratch / f"{depth.part:.6f}"

    def point(self, depth: Depth) -> Point:
        """Choose at a depth, and measure what the target asks for."""
        folder = self.folder(depth)
        folder.mkdir()
        selection = select(self.dense, self.windows, depth.methods, folder, self.journal)
        value = self._value(selection)
        self.measured += 1
        self.journal.metrics({f"search.{self.target.figure}": value, "search.part": depth.part}, self.measured)
        return Point(part=depth.part, ratios=depth.ratios, value=value, holds=holds(self.target, value))

    def _value(self, selection: Selection) -> float:
        if self.target.figure == "bytes":
            checkpoint = PrunableCheckpoint.open(self.model)
            return float(sum(one.size for one in remaining(checkpoint, selection.removed, selection.channels).values()))
        if self.target.figure == "prefill":
            return self._speedup(selection)
        return self._quality_without(selection) / self.base

    def _quality_without(self, selection: Selection) -> float:
        """Return the quality without the selection, after the transfer."""
        transfer, model = self.target.transfer.chosen, self.dense
        if transfer:
            model = _loaded(self.model)
            transfer.apply(model, self.windows, selection, journal=self.journal)
        with bypassed(model, selection.removed), narrowed(model, selection.channels):
            return self._quality(model)

    def _quality(self, model: PreTrainedModel) -> float:
        measure = perplexity if self.target.figure == "perplexity" else next_token_accuracy
        return measure(model, self.held, BATCH)

    def _speedup(self, selection: Selection) -> float:
        """Return the time of a pass of the dense model over that of the cut one, which take turns. The transfer changes no shape."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            cut_checkpoint(self.model, Path(folder) / "model", selection.removed, selection.channels)
            cut = _loaded(Path(folder) / "model")
        models = (self.dense, cut)
        times = [[_seconds(model, self.held[:BATCH]) for model in models] for _ in range(1 + REPEATS)][1:]
        dense, pruned = (statistics.median(column) for column in zip(*times, strict=True))
        return dense / pruned


def _loaded(folder: Path) -> PreTrainedModel:
    model = load_model(folder, device=best_device())
    raise_weights(model)
    return model


@torch.inference_mode()
def next_token_accuracy(model: PreTrainedModel, windows: Tensor, batch_size: int) -> float:
    """Return the part of the tokens, each window's first left out, that the model gives the highest probability.

    Args:
        model: a causal language model.
        windows: (N, L) token ids.
        batch_size: windows a forward pass.
    """
    right = 0
    for batch in windows.split(batch_size):
        ids = batch.to(model.device, torch.long)
        likeliest = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)  # (batch, L − 1)
        right += int((likeliest == ids[:, 1:]).sum())
    return right / (windows.shape[0] * (windows.shape[1] - 1))


@torch.inference_mode()
def _seconds(model: PreTrainedModel, batch: Tensor) -> float:
    ids = batch.to(model.device, torch.long)
    began = time.perf_counter()
    model(input_ids=ids, use_cache=False).logits[0, 0, 0].item()  # waits for the device
    return time.perf_counter() - began
