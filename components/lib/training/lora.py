"""Low-rank adapters (arXiv 2106.09685) on every linear layer of the blocks, by peft."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
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
        exclude_modules=_routers(model) or None,
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


def _routers(model: PreTrainedModel) -> list[str]:
    """Return the names of routers that are linear layers (Phi-3.5-MoE, Llama 4). They return a tuple, which an adapter cannot be added to.

    The routers of other mixtures are no linear layers for peft, and are not adapted either.
    """
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name, module in linear if type(module) is not nn.Linear and name.endswith(".router")]


def save_adapters(model: PeftModel, folder: Path) -> None:
    """Write the adapters as peft loads them: `adapter_model.safetensors` and `adapter_config.json`.

    The same adapters give the same bytes, which `PeftModel.save_pretrained` does not: it writes the folder that the base model was
    loaded from, and sets in any order.
    """
    config = copy.copy(model.peft_config["default"])
    for name in ("target_modules", "exclude_modules"):
        if not isinstance(getattr(config, name) or "", str):
            setattr(config, name, sorted(getattr(config, name)))
    config.base_model_name_or_path, config.inference_mode = None, True
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    weights = {name: weight.detach().cpu().contiguous() for name, weight in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def merged(model: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights, W + (α/r)·B·A, and return the model without adapters."""
    return model.merge_and_unload()
