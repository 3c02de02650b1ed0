"""A Llama that trains in milliseconds, and a folder that keeps checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from components.lib.transformer.selection import NO_CHANNELS, Channels, Selection

VOCABULARY = 48


def llama(layers: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return a Llama of hidden width 32 with tied embeddings and random weights, the same for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def counting(windows: int = 24, length: int = 16) -> Tensor:
    """Return windows (windows, length) of tokens that count upwards: a text that is learnt in a few steps."""
    starts = torch.randint(VOCABULARY, (windows, 1), generator=torch.Generator().manual_seed(0))
    return (starts + torch.arange(length)) % VOCABULARY


def chosen(*layers: int, channels: Channels = NO_CHANNELS) -> Selection:
    """Return the selection of these layers and channels."""
    return Selection(method="hand", removed=layers, order=layers, channels=channels)


class Kept:
    """Checkpoints in a folder, as the store keeps them: the newest one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, list[int]()

    def save(self, folder: Path, step: int) -> None:
        """Copy the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(folder, self.folder)
        self.steps.append(step)

    def latest(self, folder: Path) -> int | None:
        """Copy the folder back."""
        if not self.steps:
            return None
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return self.steps[-1]


class Written:
    """A journal that keeps what it is told, and may end the work at a step as kill -9 would."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.done: list[tuple[int, int]] = []
        self.killed_at = killed_at

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Keep the numbers."""
        self.lines.append((step, dict(values)))

    def progress(self, done: int, total: int, **shown: float) -> None:
        """Keep the progress."""
        self.done.append((done, total))
        if done == self.killed_at:
            raise Killed

    def curve(self, name: str) -> list[float]:
        """Return the numbers of one name in the order they came."""
        return [values[name] for _, values in self.lines if name in values]


class Killed(BaseException):
    """The work ends here."""


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's weights."""
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Say whether two sets of weights are bit-equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
