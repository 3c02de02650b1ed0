"""The dense model's outputs, computed once and kept in files, so that it need not be in memory beside the trained model.

Of each next-token distribution the largest probabilities are kept, and the mass of the rest; of the final hidden state everything.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.errors import Refusal
from components.lib.recipe.training import Optimisation, Regularize
from components.lib.training import ranks
from components.lib.training.journal import Journal, Silent
from components.lib.training.loop import autocast
from components.lib.training.objective import Targets, Top
from components.lib.training.windows import Order, Windows
from components.lib.transformer.device import computable
from components.lib.transformer.gates import final_state, text_config
from components.lib.transformer.perplexity import few_rows


class Kept:
    """What `keep` has kept of the dense model, as the training reads it.

    Its files are mapped into memory, not read: what is used of them can be dropped again at any time.

    Args:
        folder: holds the files.
        windows: how many windows are kept.
        length: tokens of each.
        model: the dense model; its widths and its dtype are those of the files.
        settings: of the training.
        rows: (windows of the text,): the place of each in the files, -1 if the training does not see it.
    """

    def __init__(
        self, folder: Path, windows: int, length: int, model: PreTrainedModel, settings: Regularize, rows: Tensor
    ) -> None:
        config, shape = text_config(model), (windows, length)
        self.rows, self.top, self.state = rows, None, None
        if settings.objective.kl > 0:
            k = min(settings.teacher_top or 0, config.vocab_size)
            tokens = _mapped(folder / "tokens", (*shape, k), torch.int32)
            self.top = Top(tokens, _mapped(folder / "logs", (*shape, k + 1), torch.float32))
        if settings.objective.state > 0:
            self.state = _mapped(folder / "state", (*shape, config.hidden_size), model.dtype)

    def targets(self, rows: Tensor) -> Targets:
        """Return what is kept of some windows, on the device of `rows` (batch,), their places in the files."""
        device, rows = rows.device, rows.cpu()
        top = Top(*(part[rows].to(device) for part in self.top)) if self.top else None
        return Targets(top, None if self.state is None else self.state[rows].to(device))


class Numbered(Windows):
    """Windows with a first column more: the place of each in the files of what is kept."""

    def __init__(self, windows: Tensor | Windows, kept: Kept) -> None:
        self.windows, self.given, self.rows = len(windows), windows, kept.rows
        self.per_file = windows.per_file if isinstance(windows, Windows) else len(windows)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the windows (n, 1 + length) of some indices (n,)."""
        given = self.given[indices]
        return torch.cat([self.rows[indices][:, None].to(given.dtype), given], dim=1)


@torch.no_grad()
def keep(
    model: PreTrainedModel,
    windows: Tensor | Windows,
    settings: Regularize,
    folder: Path,
    journal: Journal | None = None,
) -> Kept:
    """Run the dense model on every window that the training will see, and keep its outputs in `folder`.

    The processes of a machine share the windows and the files; each machine makes its own.

    Args:
        model: the dense model; it is not changed.
        windows: token ids (windows, length), in memory or in files.
        settings: of the training.
        folder: the same one for all processes of a machine.
        journal: takes the progress.

    Raises:
        Refusal: the disk has no room for the files.
    """
    device, journal = ranks.join(), journal or Silent()
    order = Order(windows, settings.batch_size, settings.seed)
    seen = sorted({window for step in range(settings.steps) for window in map(int, order.batch(step))})
    rows = torch.full((len(windows),), -1)
    rows[seen] = torch.arange(len(seen))
    length = windows[torch.tensor(seen[:1])].shape[1]
    _require_room(folder, size(len(seen), length, text_config(model).hidden_size, model.dtype.itemsize, settings))
    kept = Kept(folder, len(seen), length, model, settings, rows)
    divided = ranks.must_divide(None, model, settings)
    held, share = ranks.divided(model, device) if divided else model, ranks.share_here(len(seen))
    with (
        nullcontext() if divided else ranks.on_device(model),
        nullcontext() if divided else computable(model),
        final_state(held) as state,
    ):
        for done, row in enumerate(share, 1):
            batch = windows[torch.tensor([seen[row]])].long().to(next(held.parameters()).device)
            with autocast(batch.device, settings.precision):
                logits = held(input_ids=batch, use_cache=False).logits[0]
            _write(kept, row, logits, state.value)
            journal.progress(done, len(share))
    ranks.wait()
    return kept


def _write(kept: Kept, row: int, logits: Tensor, state: Tensor | None) -> None:
    """Write the outputs of one window: logits (length, vocabulary) and the final state (1, length, hidden)."""
    if kept.top:
        tokens, logs = (part[row] for part in kept.top)
        for some in few_rows(logits):
            tokens[some], logs[some] = Top.of(logits[some], tokens.shape[-1])
    if kept.state is not None and state is not None:
        kept.state[row] = state[0]


def _require_room(folder: Path, needed: int) -> None:
    """Raise Refusal if the disk has no room: a mapped file is given room when it is written, and the process would be killed."""
    free = shutil.disk_usage(folder).free
    ranks.wait()  # nobody writes before all have looked
    if needed > free:
        raise Refusal(
            f"regularize.teacher_top keeps {needed / 1e9:.3g} GB of the dense model's outputs in {folder}, which has {free / 1e9:.3g} GB: "
            "lower it, regularize.steps or regularize.batch_size, set objective.state to 0, or leave teacher_top out"
        )


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that is a file: it is made if it is not there, and written as the tensor is."""
    count = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)


def size(windows: int, length: int, hidden: int, itemsize: int, settings: Optimisation) -> int:
    """Return the bytes of the files for `windows` windows, of a model so wide whose numbers have `itemsize` bytes: 0 if none are kept."""
    if not isinstance(settings, Regularize) or settings.teacher_top is None:
        return 0
    seen = min(windows, settings.steps * settings.batch_size)
    distribution = 8 * settings.teacher_top + 4 if settings.objective.kl else 0
    state = hidden * itemsize if settings.objective.state else 0
    return seen * length * (distribution + state)
