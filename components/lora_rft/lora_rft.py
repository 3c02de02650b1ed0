"""Fine-tune the pruned model with low-rank adapters, merged at the end."""

from __future__ import annotations

from pathlib import Path

from components.lib.recipe.training import Recover
from components.lib.training import ranks
from components.lib.training.journal import Checkpoints, Journal
from components.lib.training.recover import recover as fine_tune
from components.lib.training.windows import Fetch, training_windows
from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.device import best_device
from components.lib.transformer.export import answers, save_model, verify_export
from components.lib.transformer.text import load_windows


def lora_rft(
    model: Path,
    windows: Path,
    *,
    recover: Recover,
    out: Path,
    journal: Journal,
    checkpoints: Checkpoints,
    fetch: Fetch | None = None,
) -> None:
    """Leave the fine-tuned model with the pruned model's card in `out/model`, and `verification.json`.

    With `keep_adapter`, also leave the adapters in `out/adapter`: the pruned model with them computes what `out/model` computes, but
    for rounding.

    Args:
        model: the folder of the pruned model's artifact.
        windows: the folder of the calibration windows.
        recover: the recipe's section.
        out: the folder to fill.
        journal: takes the losses.
        checkpoints: stores the training's checkpoints.
        fetch: gives a file of the calibration windows that is not in their folder; None if all are.

    Raises:
        VerificationError: the exported checkpoint gives other outputs than the trained model.
    """
    drawn = load_windows(windows)
    tuned = fine_tune(
        load_model(model / "model"),
        drawn,
        recover,
        training=training_windows(windows, drawn, fetch),
        checkpoints=checkpoints,
        journal=journal,
        adapter=out / "adapter" if recover.keep_adapter else None,
    )
    if not ranks.first():
        return
    save_model(tuned, model / "model", out / "model")
    _carry_card(model / "model", out / "model", recover)
    device = best_device()
    expected = answers(tuned.to(device).eval())
    del tuned
    verify_export(expected, out / "model", device=device).save(out)


def _carry_card(pruned: Path, tuned: Path, recover: Recover) -> None:
    """Copy the pruned model's card, with a section about the training; nothing if the model has none."""
    if (pruned / "README.md").is_file():
        card = (pruned / "README.md").read_text()
        (tuned / "README.md").write_text(card.rstrip("\n") + "\n" + FINE_TUNED.format(recover=recover))


FINE_TUNED = """
## Fine-tuning

After the cut, the model was fine-tuned with LoRA adapters of rank {recover.lora.rank} for at most {recover.steps} steps. The adapters
with the lowest perplexity on held-out windows were merged into the weights. The sections above describe the model before this training.
"""
"""The section that the fine-tuning adds to a model card; early stopping may have ended it before its last step."""
