"""Perplexity by the standard protocol: separate windows, every token predicted but a window's first."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from components.lib.transformer.device import reused_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 2**28
"""Logits held at once, at most (0.5 GiB in bf16): the batch shrinks if vocabulary × tokens would be more."""
RAISED = {"cpu": 2**18, "cuda": 2**26}
"""Logits raised to fp32 at once: on the CPU as many as its cache holds (1 MiB, 3.5 times faster than all), on a GPU 256 MiB."""

IGNORED = -100


def perplexity(
    model: PreTrainedModel, windows: Tensor, batch_size: int = 8, done: Callable[[int], None] | None = None
) -> float:
    """Return exp of the mean negative log-likelihood of the windows' tokens: `exp(−1/n Σ log p(x_t | x_<t))`.

    Each window is read alone, and n counts every token but the first of each. This is the number the GPTQ, SparseGPT and
    SliceGPT code reports on `consecutive_windows`. A NaN stays NaN, and a value too large for a float is inf.

    Args:
        model: a causal language model, used as it stands: its mode, type and device are left alone.
        windows: (N, L) token ids, on any device, L at least 2.
        batch_size: windows a forward pass, at most.
        done: called after each forward pass with the number of tokens it read.
    """
    nll, tokens = negative_log_likelihood(model, windows, batch_size, done)
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def negative_log_likelihood(
    model: PreTrainedModel, windows: Tensor, batch_size: int = 8, done: Callable[[int], None] | None = None
) -> tuple[float, int]:
    """Return the summed negative log-likelihood in nats, and the number of tokens predicted: N · (L − 1).

    The logits are made in the model's type and raised to fp32 for the loss a few rows at a time; the sum is fp64.

    Raises:
        ValueError: the windows are not (N ≥ 1, L ≥ 2).
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows must be (N >= 1, L >= 2) and are {tuple(windows.shape)}")
    count, length = windows.shape
    size = max(1, min(batch_size, LOGITS // (length * _vocabulary(model))))
    total = torch.zeros((), dtype=torch.float64)
    with reused_memory(model.device):
        for batch in windows.split(size):
            total += _batch_nll(model, batch.to(model.device, torch.long))
            if done:
                done(batch.numel())
    return total.item(), count * (length - 1)


def _vocabulary(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[0]


def rows_raised(logits: Tensor) -> int:
    """Return how many rows of logits (tokens, vocabulary) to raise to fp32 at once."""
    return max(1, RAISED.get(logits.device.type, RAISED["cpu"]) // logits.shape[-1])


@torch.inference_mode()
def _batch_nll(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Sum the negative log-likelihood of a batch: (batch, length) → (), fp64 on the CPU."""
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # (batch · length, vocabulary), no copy
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten()  # nothing follows a window's last token
    rows = rows_raised(logits)
    losses = [
        F.cross_entropy(some.float(), target, ignore_index=IGNORED, reduction="none")
        for some, target in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(losses).cpu().double().sum()
