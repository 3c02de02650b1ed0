"""The checks of a version before it serves: its files are those that were measured, and they answer."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from components.lib.errors import Refusal
from components.lib.provenance.signature import check_signature
from components.lib.provenance.verify import check_no_strangers, signature_required
from components.lib.settings import StoreSettings
from components.lib.store.store import Store
from components.lib.tracking.registry import Version

GREETING = "Hello"
TOKENS = 8
"""Tokens to generate; the first needs the prompt's pass, the others the cache."""


@dataclass(frozen=True)
class Checked:
    """The findings of the checks."""

    files: int
    bytes: int
    seconds: float
    """To fetch the files and compare them with their digests."""
    signature: str
    """`unsigned`, or who signed the files."""
    answer: str
    """The beginning of a generated text."""
    answer_seconds: float
    """To load the checkpoint and to generate."""


def check_version(version: Version, store: Store) -> Checked:
    """Fetch a version's files, compare each with its digest, check the signature, load the checkpoint and generate from it.

    Raises:
        Refusal: a file is missing, differs or was added; the signature does not hold; the checkpoint does not load or computes
            numbers that are not finite.
    """
    reference = version.reference
    check_no_strangers(reference, store)
    signature = check_signature(reference, store, signature_required(version))
    with tempfile.TemporaryDirectory(prefix="espalier-promote-", dir=StoreSettings().scratch) as scratch:
        began = time.perf_counter()
        folder = store.get(reference, Path(scratch) / "artifact")
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        answer = generate(folder / "model", f"version {version.version} of {version.name}")
        answered = time.perf_counter() - began
    manifest = store.manifest(reference)
    return Checked(len(manifest.files), manifest.size, seconds, signature, answer, answered)


def generate(folder: Path, what: str) -> str:
    """Load a checkpoint and return the text that it generates greedily after a greeting.

    Args:
        folder: the checkpoint.
        what: the model's name in a refusal.

    Raises:
        Refusal: it does not load, its chat template does not render, or its logits are not finite.
    """
    import torch

    from components.lib.transformer.checkpoint import load_model, load_tokenizer
    from components.lib.transformer.device import best_device
    from components.lib.transformer.text import prompt_ids

    try:
        tokenizer = load_tokenizer(folder)
        model = load_model(folder, device=best_device())
        ids = prompt_ids(GREETING, tokenizer)
        if not ids.numel():  # the tokenizer knows none of the words
            ids = torch.tensor([[model.config.get_text_config().bos_token_id or 0]])
        with torch.inference_mode():
            made = model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                max_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or 0,
                output_logits=True,
                return_dict_in_generate=True,
            )
    except Refusal as refusal:
        raise Refusal(f"{what} cannot generate: {refusal}") from None
    except Exception as error:  # of whatever library: a checkpoint that raises cannot serve
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Refusal(f"{what} cannot generate ({reason}): run the recompression again") from error
    if not all(torch.isfinite(logits).all() for logits in made.logits):
        raise Refusal(f"{what} generates from logits that are not finite: look at its evaluation before promoting it")
    return str(tokenizer.decode(made.sequences[0, ids.shape[1] :], skip_special_tokens=True))
