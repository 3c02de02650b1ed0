"""Train the controls: the same training without regularising first, a comparison that the papers leave out."""

from __future__ import annotations

from pathlib import Path

from components.lib.recipe.training import Recover, Regularize
from components.lib.training import ranks
from components.lib.training import regularize as training
from components.lib.training.journal import Journal, SeveralCheckpoints
from components.lib.training.recover import recover as fine_tune
from components.lib.training.teacher import keep
from components.lib.training.windows import Fetch, training_windows
from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.export import save_model
from components.lib.transformer.selection import NOTHING, Selection
from components.lib.transformer.surgery import cut_checkpoint
from components.lib.transformer.text import load_windows


def control(
    release: Path,
    windows: Path,
    selection: Path,
    *,
    kind: str,
    regularize: Regularize,
    recover: Recover,
    out: Path,
    journal: Journal,
    checkpoints: SeveralCheckpoints,
    fetch: Fetch | None = None,
) -> None:
    """Leave the control in `out/model`: the candidate's tokens, steps and trainable parameters, nothing regularised or transferred.

    Args:
        release: the folder of the dense model's artifact.
        windows: the folder of the calibration windows.
        selection: the folder of the selection.
        kind: `pruned-first` (the selection is removed before the training) or `dense-trained` (nothing is removed).
        regularize: the recipe's section; its transfer and its schedule are ignored.
        recover: the recipe's section: if the candidate is fine-tuned, so is the control.
        out: the folder to fill.
        journal: takes the losses.
        checkpoints: stores the checkpoints of both trainings.
        fetch: gives a file of the calibration windows that is not in their folder; None if all are.
    """
    drawn, start, chosen = load_windows(windows), release / "model", NOTHING
    training_data = training_windows(windows, drawn, fetch)
    pruned_first = kind == "pruned-first"
    with ranks.shared_folder(out.parent) as scratch:
        if pruned_first:
            start, chosen = scratch / "model", Selection.load(selection)
            if ranks.first_here():
                cut_checkpoint(release / "model", start, chosen.removed, chosen.channels)
            ranks.wait()
        keeps = training.keeps_teacher(regularize)
        # The dense model is gone before the other is loaded.
        kept = keep(load_model(release / "model"), training_data, regularize, scratch, journal) if keeps else None
        model = load_model(start)
        teacher = load_model(release / "model") if training.needs_teacher(regularize, pruned_first) else kept
        model = training.regularize(
            model,
            teacher,
            training_data,
            chosen,
            regularize,
            already_cut=pruned_first,
            checkpoints=checkpoints.scoped("regularize"),
            journal=journal,
        )
        if recover.enabled:
            model = fine_tune(
                model,
                drawn,
                recover,
                training=training_data,
                checkpoints=checkpoints.scoped("recover"),
                journal=journal,
            )
        if ranks.first():
            save_model(model, start, out / "model")
