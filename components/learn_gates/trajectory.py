"""Where the gates have been: a line a step, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict


class Step(TypedDict):
    """The gates after one step; a layer that went is at 0."""

    round: int
    step: int
    gates: list[float]


def save(trajectory: Sequence[Step], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(step) + "\n" for step in trajectory))


def draw(trajectory: Sequence[Step], path: Path) -> None:
    """Draw every layer's gate over the steps as an SVG; a line ends where its layer went."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    layers = len(trajectory[0]["gates"])
    colours = colormaps["viridis"].resampled(layers)
    for layer in range(layers):
        points = [(step["step"], step["gates"][layer]) for step in trajectory if step["gates"][layer] != 0]
        steps, gates = zip(*[(0, 1.0), *points], strict=True)
        axes.plot(steps, gates, color=colours(layer), linewidth=1.2)
        axes.annotate(str(layer), (steps[-1], gates[-1]), (3, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set(xlabel="step", ylabel="gate", title="Gates, one line a layer")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg")
