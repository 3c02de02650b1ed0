"""Low-rank adapters (arXiv 2106.09685) on every linear layer of the blocks, by peft."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from components.lib.recipe.training import Lora


def adapted(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Freeze the model and add adapters drawn from the seed; untrained adapters change no output.

    The modules of `model` itself are replaced, so hooks on its blocks also apply to the adapted model.
    `merged` returns the model without adapters.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merged(model: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights, W + (α/r)·B·A, and return the model without adapters."""
    return model.merge_and_unload()
