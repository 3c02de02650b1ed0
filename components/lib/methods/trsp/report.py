"""The picture of TRSP's gates in the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from components.lib.report_parts import Line, Lines, Mark, Points


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
    return [
        Round(line["round"], line["step"], tuple(gate if math.isfinite(gate) else None for gate in line["gates"]))
        for line in found
    ]


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
