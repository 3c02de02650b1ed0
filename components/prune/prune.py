"""Cut the selected layers out of the regularised model, and prove the result before it is published."""

from __future__ import annotations

from pathlib import Path

from components.recipe import Target
from components.training.journal import Journal
from components.transformer.device import best_device
from components.transformer.export import verify_cut
from components.transformer.selection import Selection
from components.transformer.surgery import cut_layers


def prune(
    release: Path, model: Path, selection: Path, *, method: str, target: Target, out: Path, journal: Journal
) -> None:
    """Leave a plain Hugging Face checkpoint in `out/model`, and `verification.json`.

    Args:
        release: the folder of the dense model's artifact.
        model: the folder of the regularised model's artifact.
        selection: the folder of the selection.
        method: the method that chose.
        target: how much was asked for.
        out: the folder to fill.
        journal: takes the progress.

    Raises:
        VerificationError: the checkpoint is not the regularised model with those layers skipped.
    """
    removed = Selection.load(selection).removed
    cut_layers(model / "model", out / "model", removed)
    journal.progress(1, 2)
    verify_cut(model / "model", out / "model", removed, device=best_device()).save(out)
    journal.progress(2, 2)
