"""Choose the layers and channels to remove, by the recipe's methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from components.lib.methods import Method
from components.lib.training.journal import Journal
from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.device import best_device, raise_weights, reused_memory
from components.lib.transformer.families import check_attention, cut_config
from components.lib.transformer.gates import family_in
from components.lib.transformer.selection import NOTHING, Selection
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
    raise_weights(model)
    select(model, load_windows(windows), methods, out, journal)


def select(
    model: PreTrainedModel, windows: Tensor, methods: Sequence[Method], out: Path, journal: Journal
) -> Selection:
    """Return the selection of all methods, and leave its files and the methods' in `out`.

    Args:
        model: the dense model.
        windows: token ids (windows, length).
        methods: in their order; each gets the selection of those before it.
        out: an existing folder.
        journal: takes the progress.

    Raises:
        Refusal: no layer of attention would stay of a hybrid, or the config cannot say which layers stay.
    """
    selection = NOTHING
    with reused_memory(model.device):
        for method in methods:
            selection = method.choose(model, windows, selection, journal=journal, out=out)
    config = model.config.to_dict()
    check_attention(config, selection.removed)
    cut_config(config, family_in(model), selection.removed)  # the training behind it would be lost
    selection.save(out)
    return selection
