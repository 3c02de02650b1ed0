"""Draw the calibration windows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.calibrate.stream import stream_windows
from components.lib.errors import Refusal
from components.lib.recipe.schema import Calibration
from components.lib.sources.shards import SHARDS, Shards, row_groups
from components.lib.store.store import Store
from components.lib.training.journal import Journal
from components.lib.training.windows import INDEX, training_file
from components.lib.transformer.checkpoint import load_tokenizer
from components.lib.transformer.text import (
    draw_windows,
    read_documents,
    text_file,
    token_stream,
    windows_possible,
)

_FILE = 1 << 23
"""Tokens of a file of windows for the trainings: 32 MB."""


def calibrate(
    release: Path,
    text: Path,
    *,
    calibration: Calibration,
    out: Path,
    journal: Journal,
    send: Callable[[Path], None] = lambda path: None,
) -> None:
    """Draw N windows of L tokens from the calibration text, tokenised by the release's own tokenizer.

    Leaves `windows.safetensors`, one int32 tensor `windows` (N, L), and `calibration.json`, which records their origin. Further windows
    for the trainings alone are in `training-00000.safetensors` and so on, as `training.json` says.

    Args:
        release: folder with the checkpoint in `model/`.
        text: folder with the text's one file, or the file; `shards.json` lists files that are read where they lie.
        calibration: how many windows, how long, which seed, and the column of the text.
        out: an empty folder.
        journal: takes the progress: the windows that are written, of all.
        send: is given each file of windows for the trainings when it is written, and may move it.

    Raises:
        Refusal: the text is too short for the windows, or it cannot be read.
    """
    further = calibration.training_samples or 0
    windows, origin = _drawn(release, text_file(text), calibration, calibration.samples + further)
    save_file({"windows": _taken(windows, calibration.samples, calibration, 0)}, out / "windows.safetensors")
    journal.progress(calibration.samples, calibration.samples + further)
    if further:
        per_file = max(1, _FILE // calibration.length)
        for number, start in enumerate(range(0, further, per_file)):
            done = calibration.samples + start
            part = _taken(windows, min(per_file, further - start), calibration, done)
            path = out / training_file(number)
            save_file({"windows": part}, path)
            send(path)
            journal.progress(done + len(part), calibration.samples + further)
        (out / INDEX).write_text(json.dumps({"windows": further, "per_file": per_file}) + "\n")
    facts = {
        **origin,
        **calibration.model_dump(include={"samples", "training_samples", "length", "seed"}, exclude_none=True),
    }
    (out / "calibration.json").write_text(json.dumps(facts, indent=2) + "\n")


def _drawn(release: Path, file: Path, calibration: Calibration, count: int) -> tuple[Iterator[Tensor], dict[str, Any]]:
    """Return `count` windows (L,) of the text in a random order, fewer only if a streamed text has no more, and their origin."""
    tokenizer, length, seed = load_tokenizer(release / "model"), calibration.length, calibration.seed
    if file.name == SHARDS:
        shards = Shards.load(file)
        groups = row_groups(shards, Store.from_environment(), seed)
        return stream_windows(groups, tokenizer, length, count, seed), {
            "files": len(shards.files),
            "bytes": shards.size,
        }
    documents = read_documents(file, calibration.data.field)
    stream = token_stream(documents, tokenizer)
    origin = {
        "documents": len(documents),
        "tokens": len(stream),
        "windows_possible": windows_possible(stream, length),
    }
    return iter(draw_windows(stream, count, length, seed)), origin


def _taken(windows: Iterator[Tensor], count: int, calibration: Calibration, before: int) -> Tensor:
    """Return the next windows (count, L), int32. Raises Refusal if there are not so many; `before` were taken already."""
    taken = [window.to(torch.int32) for window in islice(windows, count)]
    if len(taken) < count:
        wanted = calibration.samples + (calibration.training_samples or 0)
        raise Refusal(
            f"calibration.samples and training_samples ask for {wanted} windows of {calibration.length} tokens and the text gives "
            f"{before + len(taken)}: lower one of them or calibration.length, or name a longer text"
        )
    return torch.stack(taken)
