"""Move the knowledge of the selection to the rest of the model, so that the selection can be removed."""

from __future__ import annotations

from pathlib import Path

from components.lib.recipe.training import Regularize
from components.lib.training import ranks
from components.lib.training import regularize as training
from components.lib.training.journal import Checkpoints, Journal
from components.lib.training.teacher import keep
from components.lib.training.windows import Fetch, training_windows
from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.device import computable
from components.lib.transformer.export import save_model
from components.lib.transformer.selection import Selection
from components.lib.transformer.text import load_windows


def regularize(
    release: Path,
    windows: Path,
    selection: Path,
    *,
    regularize: Regularize,
    out: Path,
    journal: Journal,
    checkpoints: Checkpoints,
    fetch: Fetch | None = None,
) -> None:
    """Transfer in closed form, train, and leave the regularised model, as large as the release, in `out/model`.

    Args:
        release: the folder of the dense model's artifact.
        windows: the folder of the calibration windows.
        selection: the folder of the selection.
        regularize: the recipe's section.
        out: the folder to fill.
        journal: takes the loss and its parts.
        checkpoints: stores the training's checkpoints.
        fetch: gives a file of the calibration windows that is not in their folder; None if all are.

    Raises:
        Refusal: the loss is not finite.
    """
    model = load_model(release / "model")
    data, chosen = load_windows(windows), Selection.load(selection)
    read = training_windows(windows, data, fetch)
    with ranks.shared_folder(out.parent) as scratch:
        kept = keep(model, read, regularize, scratch, journal) if training.keeps_teacher(regularize) else None
        if regularize.transfer.chosen:
            with ranks.on_device(model), computable(model):
                regularize.transfer.chosen.apply(model, data, chosen, journal=journal)
        teacher = load_model(release / "model") if training.needs_teacher(regularize) else kept
        trained = training.regularize(
            model,
            teacher,
            read,
            chosen,
            regularize,
            checkpoints=checkpoints,
            journal=journal,
        )
    if ranks.first():
        save_model(trained, release / "model", out / "model")
