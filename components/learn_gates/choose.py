"""Choose what is removed, by the recipe's method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.lib.methods import Task, load
from components.lib.recipe.schema import Dress, Gates, Target
from components.lib.training.journal import Journal
from components.lib.transformer.channels import check_channels
from components.lib.transformer.checkpoint import PrunableCheckpoint, load_model
from components.lib.transformer.device import best_device, reused_memory
from components.lib.transformer.selection import NOTHING
from components.lib.transformer.text import load_windows


def choose(
    release: Path,
    windows: Path,
    *,
    method: str | Sequence[str],
    target: Target,
    gates: Gates,
    dress: Dress,
    out: Path,
    journal: Journal,
) -> None:
    """Leave `selection.json`, and what the method recorded on the way (TRSP: the gates' trajectory and its picture).

    Args:
        release: the folder of the dense model's artifact.
        windows: the folder of the calibration windows.
        method: one of `components.lib.recipe.schema.methods()`, or several, each of which is told what those before it chose.
        target: how much is removed.
        gates: TRSP's settings.
        dress: DReSS's settings.
        out: the folder to fill.
        journal: takes the progress.
    """
    names = [method] if isinstance(method, str) else method
    if "dress" in names:
        check_channels(PrunableCheckpoint.open(release / "model"), dress.ratios(target.ratio), dress.multiple)
    model = load_model(release / "model", device=best_device())
    drawn = load_windows(windows)
    selection = NOTHING
    with reused_memory(model.device):
        for name in names:
            task = Task(target, gates, dress, before=selection)
            selection = load(name)(model, drawn, task, journal=journal, out=out)
    selection.save(out)
