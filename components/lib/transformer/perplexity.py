"""Perplexity by the standard protocol: separate windows, every token predicted but a window's first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from components.lib.transformer.device import reused_memory
from components.lib.transformer.gates import blocks, bypassed, resumed, watched

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
    return _exp_of_mean(*negative_log_likelihood(model, windows, batch_size, done))


def _exp_of_mean(nll: float, tokens: int) -> float:
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def perplexities_without(
    model: PreTrainedModel,
    windows: Tensor,
    removed: Sequence[int],
    candidates: Sequence[int],
    batch_size: int = 8,
    done: Callable[[int], None] | None = None,
) -> dict[int, float]:
    """Return the perplexity without the layers `removed` and one of `candidates`, for each of them.

    Each number is bit for bit that of `perplexity` with the layers bypassed. The layers below a candidate compute the same with it and
    without it, so they run once for all candidates: if every layer is one, that is half of the work. The stream before each candidate is
    held for the windows of one pass.

    Args:
        model: a causal language model, used as it stands.
        windows: (N, L) token ids, on any device, L at least 2.
        removed: layers that are bypassed throughout.
        candidates: other layers.
        batch_size: windows a forward pass, at most.
        done: called with the number of tokens after each batch that all candidates have read.
    """
    count, length = windows.shape
    totals = {layer: torch.zeros((), dtype=torch.float64) for layer in candidates}
    above = range(max(candidates), len(blocks(model)))
    with reused_memory(model.device):
        for batch in windows.split(_batch_size(model, length, batch_size)):
            ids = batch.to(model.device, torch.long)
            with torch.inference_mode(), bypassed(model, [*removed, *above]), watched(model, candidates) as seen:
                model.base_model(input_ids=ids, use_cache=False)
                streams = {layer: x for layer, (x, _) in seen.items()}
            for layer, stream in streams.items():
                with bypassed(model, removed), resumed(model, layer, ids, stream):
                    totals[layer] += _batch_nll(model, ids)
            if done:
                done(batch.numel())
    return {layer: _exp_of_mean(total.item(), count * (length - 1)) for layer, total in totals.items()}


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
    total = torch.zeros((), dtype=torch.float64)
    with reused_memory(model.device):
        for batch in windows.split(_batch_size(model, length, batch_size)):
            total += _batch_nll(model, batch.to(model.device, torch.long))
            if done:
                done(batch.numel())
    return total.item(), count * (length - 1)


def _batch_size(model: PreTrainedModel, length: int, most: int) -> int:
    """Return how many windows of a length to read at once: at most `most`, and at most LOGITS logits."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return max(1, min(most, LOGITS // (length * vocabulary)))


def few_rows(logits: Tensor) -> Iterator[slice]:
    """Yield slices that together are all rows of logits (tokens, vocabulary), each of as many as are raised to fp32 at once."""
    count = max(1, RAISED.get(logits.device.type, RAISED["cpu"]) // logits.shape[-1])
    return (slice(start, start + count) for start in range(0, len(logits), count))


@torch.inference_mode()
def _batch_nll(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Sum the negative log-likelihood of a batch: (batch, length) → (), fp64 on the CPU."""
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # (batch · length, vocabulary), no copy
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten()  # nothing follows a window's last token
    losses = [
        F.cross_entropy(logits[rows].float(), targets[rows], ignore_index=IGNORED, reduction="none")
        for rows in few_rows(logits)
    ]
    return torch.cat(losses).cpu().double().sum()
