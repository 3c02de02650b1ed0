"""A prompt is continued greedily, and as a message if the model knows messages."""

from __future__ import annotations

import torch

from components.evaluate.prompts import TOKENS, continue_prompts
from tests.components.lib.transformer import zoo


def test_a_continuation_is_the_likeliest_token_after_token() -> None:
    model, tokenizer = zoo.SPECIMENS[0].model(layers=2).eval(), zoo.tokenizer()
    ids = tokenizer("w10 w9", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert continue_prompts(model, tokenizer, ["w10 w9"]) == {"w10 w9": expected}


def test_a_chat_template_wraps_the_prompt() -> None:
    model, tokenizer = zoo.SPECIMENS[0].model(layers=2).eval(), zoo.tokenizer()
    plain = continue_prompts(model, tokenizer, ["w7 w10 w9"])["w7 w10 w9"]
    tokenizer.chat_template = "w7 {{ messages[0].content }}"
    assert continue_prompts(model, tokenizer, ["w10 w9"]) == {"w10 w9": plain}
