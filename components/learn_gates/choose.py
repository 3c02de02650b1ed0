"""Choose the layers and channels to remove, by the recipe's methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.learn_gates.select import select
from components.lib.methods import Method
from components.lib.training.journal import Journal
from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.device import best_device
from components.lib.transformer.text import load_windows


def choose(release: Path, windows: Path, *, methods: Sequence[Method], out: Path, journal: Journal) -> None:
    """Leave `selection.json`, `choice.json`, and the files of each method (TRSP: the gates' trajectory and its picture).

    Args:
        release: the folder of the dense model's artifact.
        windows: the folder of the calibration windows.
        methods: the recipe's methods in their order; each gets the selection of those before it.
        out: the folder to fill.
        journal: takes the progress.
    """
    model = load_model(release / "model", device=best_device())
    select(model, load_windows(windows), methods, out, journal)
