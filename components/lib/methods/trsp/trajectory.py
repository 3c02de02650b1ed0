"""The gates over the steps of their training, as JSON lines and as a picture. The same steps give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict


class Step(TypedDict):
    """The gates after one step; the gate of a removed layer is 0."""

    round: int
    step: int
    gates: list[float]


def save(trajectory: Sequence[Step], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(step) + "\n" for step in trajectory))


def draw(trajectory: Sequence[Step], path: Path) -> None:
    """Draw the gate of every layer over the steps as an SVG; a line ends at the step that removed its layer.

    Args:
        trajectory: the steps in order, at least one; every step has a gate for every layer.
        path: the file to write. Its digest becomes part of the keys of later stages, so it holds no date and no random
            identifier, and a matplotlibrc of the user does not change it.
    """
    from matplotlib import colormaps, style
    from matplotlib.figure import Figure

    with style.context(["default", {"svg.hashsalt": "espalier"}]):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        layers = len(trajectory[0]["gates"])
        colours = colormaps["viridis"].resampled(layers)
        for layer in range(layers):
            points = [(step["step"], step["gates"][layer]) for step in trajectory if step["gates"][layer] != 0]
            steps, gates = zip(*[(0, 1.0), *points], strict=True)
            axes.plot(steps, gates, color=colours(layer), linewidth=1.2)
            axes.annotate(
                str(layer), (steps[-1], gates[-1]), (3, 0), textcoords="offset points", fontsize=7, va="center"
            )
        axes.set(xlabel="step", ylabel="gate", title="Gates, one line a layer")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
