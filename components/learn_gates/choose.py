"""Choose what is removed, by the recipe's method."""

from __future__ import annotations

from pathlib import Path

from components.learn_gates.methods import load
from components.recipe import Gates, Target
from components.training.journal import Journal
from components.transformer.checkpoint import Checkpoint, layers_to_remove, load_model
from components.transformer.device import best_device
from components.transformer.text import load_windows


def choose(
    release: Path, windows: Path, *, method: str, target: Target, gates: Gates, out: Path, journal: Journal
) -> None:
    """Leave `selection.json`, and what the method recorded on the way (TRSP: the gates' trajectory and its picture).

    Args:
        release: the folder of the dense model's artifact.
        windows: the folder of the calibration windows.
        method: one of `components.recipe.methods()`.
        target: how much is removed.
        gates: TRSP's settings.
        out: the folder to fill.
        journal: takes the progress.
    """
    checkpoint = Checkpoint.open(release / "model")
    count = layers_to_remove(target.ratio, checkpoint.layers)
    model = load_model(release / "model", device=best_device())
    selection = load(method)(model, load_windows(windows), count, gates, journal=journal, out=out)
    selection.save(out)
