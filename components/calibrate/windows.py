"""Draw the calibration windows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from components.lib.recipe.schema import Calibration
from components.lib.training.journal import Journal
from components.lib.transformer.checkpoint import load_tokenizer
from components.lib.transformer.text import (
    draw_windows,
    read_documents,
    text_file,
    token_stream,
    windows_possible,
)


def calibrate(release: Path, text: Path, *, calibration: Calibration, out: Path, journal: Journal) -> None:
    """Draw N windows of L tokens from the calibration text, tokenised by the release's own tokenizer.

    Leaves `windows.safetensors`, one int32 tensor `windows` (N, L), and `calibration.json`, which records their origin.

    Args:
        release: folder with the checkpoint in `model/`.
        text: folder with the text's one file, or the file.
        calibration: how many windows, how long, which seed, and the column of the text.
        out: an empty folder.
        journal: takes the progress: one part for the tokenised text, one for the written windows.

    Raises:
        Refusal: the text is too short for the windows, or it cannot be read.
    """
    documents = read_documents(text_file(text), calibration.data.field)
    stream = token_stream(documents, load_tokenizer(release / "model"))
    journal.progress(1, 2)
    windows = draw_windows(stream, calibration.samples, calibration.length, calibration.seed)
    save_file({"windows": windows.to(torch.int32)}, out / "windows.safetensors")
    facts = {
        "documents": len(documents),
        "tokens": len(stream),
        "windows_possible": windows_possible(stream, calibration.length),
        "samples": calibration.samples,
        "length": calibration.length,
        "seed": calibration.seed,
    }
    (out / "calibration.json").write_text(json.dumps(facts, indent=2) + "\n")
    journal.progress(2, 2)
