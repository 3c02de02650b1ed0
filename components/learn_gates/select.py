"""Let the methods choose, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from components.lib.methods import Method
from components.lib.training.journal import Journal
from components.lib.transformer.device import reused_memory
from components.lib.transformer.selection import NOTHING, Selection


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
    """
    selection = NOTHING
    with reused_memory(model.device):
        for method in methods:
            selection = method.choose(model, windows, selection, journal=journal, out=out)
    selection.save(out)
    return selection
