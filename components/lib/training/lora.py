"""Low-rank adapters (arXiv 2106.09685) on every linear layer of the blocks, by peft."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from components.lib.recipe.training import Lora
from components.lib.transformer.gates import family_in


def adapted(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Freeze the model and add adapters drawn from the seed; untrained adapters change no output.

    The modules of `model` itself are replaced, so hooks on its blocks also apply to the adapted model.
    `merged` returns the model without adapters.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_matrices(model),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _matrices(model: PreTrainedModel) -> str | list[str]:
    """Return the names of the matrices that are adapted: all but the head, of a wrapper those of its text model's blocks."""
    family = family_in(model)
    if not family.wraps:
        return "all-linear"
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linear if family.block_of(f"{name}.")]


def merged(model: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights, W + (α/r)·B·A, and return the model without adapters."""
    return model.merge_and_unload()
