"""Prompts continued by a model, greedily: what a person reads first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from components.lib.transformer.text import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 48
"""The most tokens of a continuation."""


@torch.inference_mode()
def continue_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> dict[str, str]:
    """Return the continuation of each prompt; a tokenizer with a chat template puts the prompt as a user's message."""
    return {prompt: _continued(model, tokenizer, prompt) for prompt in prompts}


def _continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    ids = prompt_ids(prompt, tokenizer).to(model.device)
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
