"""ShortGPT (arXiv 2403.03853): remove the layers that turn their input the least."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from components.lib.methods import Task
from components.lib.training.journal import Journal
from components.lib.transformer.gates import blocks, watched
from components.lib.transformer.selection import Selection


@torch.no_grad()
def choose(model: PreTrainedModel, windows: Tensor, task: Task, *, journal: Journal, out: Path | None) -> Selection:
    """Choose the layers of smallest Block Influence, BI_i = 1 − mean over tokens of cos(x_i, f_i(x_i)), measured once."""
    layers = range(len(blocks(model)))
    similarity = torch.zeros(len(layers), dtype=torch.float64)
    done = 0
    with watched(model, layers) as seen:
        for batch in windows.split(task.gates.batch_size):
            model(input_ids=batch.long().to(model.device), use_cache=False)
            for layer, (x_in, x_out) in seen.items():
                similarity[layer] += functional.cosine_similarity(x_in.float(), x_out.float(), dim=-1).sum().cpu()
            done += len(batch)
            journal.progress(done, len(windows))
    influence = (1 - similarity / windows.numel()).tolist()
    order = sorted(layers, key=influence.__getitem__)[: task.layers(model)]
    return Selection(
        method="shortgpt",
        removed=tuple(sorted(order)),
        order=tuple(order),
        scores={"block_influence": tuple(influence)},
    )
