"""The release of the demonstration: a small Llama with its own tokenizer, trained in about a minute on text of this machine.

release = make_release(Path("demo"), journal=Silent())
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lib.recipe.training import Optimisation
from components.lib.training.journal import Journal
from pipeline.demo.text import TEXTS, texts

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WINDOW = 128
CHARACTERS = 2_200_000
"""Length of the training text: the training steps read it about once."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,  # a quarter of them is two
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,  # about 1/√hidden_size: at the usual 0.02 so narrow a model's blocks are slow to wake
}

TRAINING = Optimisation(steps=200, batch_size=8, learning_rate=4e-3, warmup=0.03, weight_decay=0.1)

OVERRIDES: tuple[str, ...] = (
    "calibration.samples=512",
    f"calibration.length={WINDOW}",
    "methods.trsp.steps=6",
    "regularize.steps=50",  # few, so that the whole takes minutes
    "evaluate.controls=[pruned-first]",
    # Prompt and answer fit in the window that the model was trained on.
    "evaluate.speed.batches=[1, 8]",
    f"evaluate.speed.prompt={WINDOW // 2}",
    f"evaluate.speed.generate={WINDOW // 8}",
    # A model of this size is timed in milliseconds, which a busy machine doubles: its speed is reported and not judged.
    "promote.rules.quality.bound=1.1",
    "promote.rules.prefill=null",
    "promote.rules.decode=null",
)
"""Overrides that fit the shipped recipe to this release's size."""


@dataclass(frozen=True)
class DemoRelease:
    """A complete release: its checkpoint, its texts and its perplexity."""

    folder: Path
    seed: int
    perplexity: float
    """On the test text, by the standard protocol at `WINDOW` tokens; that of a uniform distribution is `VOCABULARY`."""

    @property
    def model(self) -> Path:
        """Return the folder of the Hugging Face checkpoint."""
        return self.folder / "model"

    def text(self, name: str) -> Path:
        """Return the file of a text: `train`, `calibration`, `test` or `other`."""
        return self.folder / f"{name}.txt"

    def overrides(self) -> tuple[str, ...]:
        """Return the overrides that make a recipe calibrate and evaluate on its texts."""
        path = {name: json.dumps(str(self.text(name).resolve())) for name in TEXTS}
        return (
            f"calibration.data={path['calibration']}",
            f"evaluate.perplexity={{python: {path['test']}, descriptions: {path['other']}}}",
        )


def make_release(folder: Path, *, seed: int = 0, journal: Journal) -> DemoRelease:
    """Make the release in `folder`, or return the complete one that is there.

    Args:
        folder: gets `model/`, `train.txt`, `calibration.txt`, `test.txt` (the Python documentation, held out), `other.txt`
            (text of another kind) and, last, `release.json`.
        seed: seed of the texts' draw, the initial weights and the batches' order. The same seed and packages make the same release.
        journal: takes the training's loss and progress.
    """
    release = _made(folder)
    if release is None or release.seed != seed:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            release = _make(Path(scratch) / folder.name, seed, journal)
            shutil.rmtree(folder, ignore_errors=True)
            release.folder.rename(folder)
    return replace(release, folder=folder)


def _made(folder: Path) -> DemoRelease | None:
    """Return the release in the folder, or None if it is not complete."""
    file = folder / "release.json"
    return DemoRelease(folder, **json.loads(file.read_text())) if file.is_file() else None


def _make(folder: Path, seed: int, journal: Journal) -> DemoRelease:
    """Make the release in a folder that does not exist yet."""
    from components.lib.transformer.perplexity import perplexity

    (folder / "model").mkdir(parents=True)
    parts = texts(CHARACTERS, seed)
    for name, text in parts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    tokenizer = _tokenizer(parts["train"])
    model = _trained(tokenizer, _windows(parts["train"], tokenizer), seed, journal)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    release = DemoRelease(folder, seed, perplexity(model, _windows(parts["test"], tokenizer)))
    facts = {"seed": release.seed, "perplexity": release.perplexity}
    (folder / "release.json").write_text(json.dumps(facts) + "\n")
    return release


def _tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=WINDOW, **SPECIAL)


def _windows(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Cut the text into consecutive windows: (windows, WINDOW)."""
    from components.lib.transformer.text import consecutive_windows, token_stream

    return consecutive_windows(token_stream([text], tokenizer), WINDOW)


def _trained(tokenizer: PreTrainedTokenizerFast, windows: Tensor, seed: int, journal: Journal) -> LlamaForCausalLM:
    """Train a new model on the windows (windows, length), and return it in bf16, the usual dtype of releases."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from components.lib.training.loop import learning_rate
    from components.lib.training.windows import Order
    from components.lib.transformer.device import computes_in_bf16

    special = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **special)).train()
    optimizers = _optimizers(model)
    order = Order(windows, TRAINING.batch_size, seed)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bf16(torch.device("cpu")))
    for step in range(TRAINING.steps):
        with bf16:
            loss = _next_token_loss(model, windows[order.batch(step)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip)
        for optimizer, scale in optimizers:
            optimizer.param_groups[0]["lr"] = scale * learning_rate(step, TRAINING)
            optimizer.step()
            optimizer.zero_grad()
        journal.metrics({"loss": loss.item()}, step + 1)
        journal.progress(step + 1, TRAINING.steps, loss=loss.item())
    return model.eval().to(torch.bfloat16)


def _optimizers(model: LlamaForCausalLM) -> list[tuple[Optimizer, float]]:
    """Return Muon for the blocks' matrices and AdamW for the rest, each with the factor on its learning rate.

    From random weights, in this few steps, Muon (Jordan et al., 2024) reaches half of AdamW's perplexity, and the deeper layers
    contribute. The stages' training loop has no Muon, because it trains models that are trained already.
    """
    from torch.optim import AdamW, Muon

    table = model.get_input_embeddings().weight  # the head's too
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and weight is not table]
    others = [weight for weight in model.parameters() if weight.ndim != 2 or weight is table]
    decay = TRAINING.weight_decay
    return [
        (Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"), 3.0),
        (AdamW(others, betas=(0.9, 0.95), weight_decay=decay), 1.0),
    ]


def _next_token_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Return the cross-entropy of every token of a batch (batch, length) but each window's first."""
    from torch.nn import functional

    logits = model(input_ids=batch, use_cache=False).logits  # (batch, length, vocabulary)
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
