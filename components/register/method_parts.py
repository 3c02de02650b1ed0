"""The words and pictures in the report that belong to one method each: TRSP's gates, DReSS's channels and slices.

Everything here is to move into the methods' own files. Until then this is the only module of the report that knows a method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from components.lib.recipe.schema import Recipe
from components.lib.report_parts import Line, Lines, Mark, Part, Points, Sentence
from components.lib.transformer.channels import ALIGNED
from components.lib.transformer.removal import Removal
from components.lib.transformer.selection import Selection
from components.register.measured import finite

SCORES = {
    "gate": "the layer's gate when it was removed or, if it stays, at the end",
    "block_influence": "the layer's Block Influence (1 − mean cosine between its input and its output)",
    "perplexity": "perplexity on the calibration text without the layer, when last measured",
}
"""Explanations of the scores of layers; a score that is not listed is shown under its own name. A low one: little needed."""

CHOSEN = {
    "random": "drawn at random",
    "magnitude": "those of the smallest weights",
    "activation": "those of the smallest weights × activations on the calibration windows",
}
"""The channels that each of DReSS's choices removes."""

SLICES = {
    "slices_attention": "attention",
    "slices_ffn": "feed-forward",
    "slices_rest": "embeddings, head and norms",
}
"""Names of the metrics of the slices, and of the parts of the model that they measure."""


@dataclass(frozen=True)
class Round:
    """A line of `trajectory.jsonl`: the gates after a step of a round."""

    round: int
    step: int
    gates: tuple[float | None, ...]
    """One for each layer; None if it is not a finite number."""


def read_trajectory(folder: Path) -> list[Round]:
    """Read `folder/trajectory.jsonl`; empty if there is none, since not every method learns gates."""
    path = folder / "trajectory.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.strip()]
    return [Round(line["round"], line["step"], tuple(finite(gate) for gate in line["gates"])) for line in found]


def removed(selection: Selection, recipe: Recipe, rounds: Sequence[Round]) -> list[Part]:
    """Return what the methods add to the section "What was removed"."""
    parts: list[Part] = []
    if selection.channels:
        parts.append(Sentence(f"The removed channels are {CHOSEN[recipe.dress.channels]}."))
    if rounds:
        parts.append(gates(rounds, selection.removed))
    return parts


def gates(rounds: Sequence[Round], chosen: Sequence[int]) -> Lines:
    """Return the gate of every layer over the steps of all rounds; the lines of the removed layers stand out.

    Args:
        rounds: at least one, in order.
        chosen: the removed layers.
    """
    count = len(rounds[0].gates)
    lines = []
    for layer in range(count):
        points = [(step, gate) for step, line in enumerate(rounds, 1) if (gate := line.gates[layer]) is not None]
        lines.append(Line(f"layer {layer}", _until_removed(points), stands_out=layer in chosen))
    begins = [step + 0.5 for step, (one, two) in enumerate(pairwise(rounds), 1) if one.round != two.round]
    return Lines(
        x="optimizer step, all rounds",
        y="gate",
        lines=lines,
        summary=f"Gates of {count} layers over {len(rounds)} steps",
        caption="Every layer's gate while it was learned, the removed layers in colour; a vertical line begins a new round.",
        marks=[Mark(step) for step in begins],
        names="ends",
    )


def _until_removed(points: Points) -> Points:
    """Return the points up to the last gate that is not 0: the gate of a removed layer is 0."""
    last = next((i for i in range(len(points) - 1, -1, -1) if points[i][1] != 0), 0)
    return points[: last + 1]


def training(recipe: Recipe, curves: Mapping[str, Points], mark: Mark | None) -> list[Part]:
    """Return what the methods add to the section "Training".

    Args:
        recipe: its `regularize` says which norm was measured.
        curves: (step, value) by the metric's name, of the training before the cut.
        mark: the step from which the regularisation is at its full strength.
    """
    lines = [Line(part, curves[name]) for name, part in SLICES.items() if name in curves]
    if not lines:
        return []
    norm = "squared ℓ2 norm" if recipe.regularize.norm == "l2" else "ℓ1 norm"
    title = f"{norm} of the slices, of its start"
    return [
        Lines(
            x="optimizer step",
            y=title,
            lines=lines,
            summary=f"{title}: {', '.join(line.name for line in lines)}",
            title="What the cut takes away",
            caption=(
                "The slices of the weights that the cut removes, relative to their norm before the training, as the model "
                "sees them: multiplied by their gates. The part that is not at 0 at the end is lost in the cut."
            ),
            marks=[mark] if mark else [],
        )
    ]


def asked(removal: Removal, recipe: Recipe) -> tuple[float | None, str]:
    """Return the part of an axis that the recipe asks for, and why the removed part differs.

    Returns:
        A ratio, None if the axis only shrinks with another one; and the reason, empty if nothing differs.
    """
    target = recipe.target.ratio
    part = target if removal.axis == "layers" else recipe.dress.ratios(target).get(removal.axis)
    if part is None:
        other = "heads" if removal.axis == "hidden" else "hidden"
        return None, f"shrinks with {other} in this family"
    return part, _rounded(removal, recipe) if abs(removal.part - part) > 5e-4 else ""


def _rounded(removal: Removal, recipe: Recipe) -> str:
    multiple = recipe.dress.multiple or ALIGNED
    if removal.axis in ("hidden", "ffn") and removal.after % multiple == 0:
        return f"rounded: a multiple of {multiple} stays"
    whole = {"layers": "layers", "heads": "key-value groups"}.get(removal.axis, "heads, with which it shrinks")
    return f"rounded to whole {whole}"
