"""Cut what was selected out of the regularised model, and prove the result before it is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from components.lib.training.journal import Journal
from components.lib.transformer.checkpoint import Checkpoint, PrunableCheckpoint
from components.lib.transformer.device import best_device
from components.lib.transformer.export import verify_cut
from components.lib.transformer.selection import Selection
from components.lib.transformer.surgery import cut_checkpoint
from components.prune.card import model_card


def prune(
    release: Path,
    model: Path,
    selection: Path,
    *,
    lineage: Mapping[str, Any],
    made_by: Mapping[str, Any],
    out: Path,
    journal: Journal,
) -> None:
    """Leave a plain Hugging Face checkpoint with its model card in `out/model`, and `verification.json`.

    Args:
        release: a folder with the release's config.json, the headers of its weights and its model card, if it has one.
        model: the folder of the regularised model's artifact.
        selection: the folder of the selection.
        lineage: the release's `source`, `revision` and `digest`, and what `model_card` says of it; `heads`, the tensors of heads for
            multi-token prediction that a GGUF file holds and its snapshot does not.
        made_by: the recipe's sections that made the checkpoint, as plain data, for its card.
        out: the folder to fill.
        journal: takes the progress.

    Raises:
        VerificationError: the checkpoint is not the regularised model with those layers skipped and those channels at 0.
    """
    chosen = Selection.load(selection)
    cut_checkpoint(model / "model", out / "model", chosen.removed, chosen.channels)
    journal.progress(1, 2)
    proof = verify_cut(model / "model", out / "model", chosen.removed, chosen.channels, device=best_device())
    # The regularised model may have been saved without them already, and a GGUF file was pinned without them.
    dropped = (*PrunableCheckpoint.open(release / "model").ignored, *lineage.get("heads", ()))
    verification = replace(proof, dropped=dropped)
    verification.save(out)
    regularised = Checkpoint.open(model / "model")
    card = model_card(
        release=lineage,
        recipe=made_by,
        selection=chosen,
        widths=regularised.widths,
        wraps=bool(regularised.family and regularised.family.wraps),
        verification=asdict(verification),
        release_card=_card(release),
    )
    (out / "model" / "README.md").write_text(card)
    journal.progress(2, 2)


def _card(release: Path) -> str:
    card = release / "model" / "README.md"
    return card.read_text() if card.is_file() else ""
