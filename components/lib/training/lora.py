"""Low-rank adapters (arXiv 2106.09685) on every linear layer of the blocks, by peft."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from components.lib.recipe.training import Lora


def adapted(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Freeze the model and put adapters into it, drawn from the seed; they change nothing until they are trained.

    The modules of `model` itself are replaced, so that hooks on its blocks hold for the adapted model too.
    `merged` gives the plain model back.
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
    """Add the adapters to the weights, W + (α/r)·B·A, and return the plain model."""
    return model.merge_and_unload()
