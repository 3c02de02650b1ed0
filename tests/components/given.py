"""What the training stages are given, as their runner lays it before them: artifacts in folders, made on the spot."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from components.lib.transformer.checkpoint import load_model
from components.lib.transformer.gates import skipped
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import NO_CHANNELS, Channels, Selection
from tests.components.lib.training.tiny import Kept, counting
from tests.components.lib.transformer import zoo

CHANNELS = Channels(hidden=tuple(range(0, 32, 2)), ffn=(tuple(range(16)),) * 4, heads=((0,), (1,), (1,), (0,)))
"""Of the release's channels half the hidden ones, a third of ffn and one of two groups."""

TRAINING = {"steps": 6, "batch_size": 4, "learning_rate": 3e-3, "precision": "fp32"}
"""Enough to learn to count a little."""

ADAPTERS = {"trainable": "lora", "steps": 20, "learning_rate": 0.02}
"""Enough for adapters."""


@dataclass(frozen=True)
class Given:
    """A run's folder with a release of four layers, windows of a text that counts, and layer 1 chosen to go, or channels too."""

    folder: Path

    @classmethod
    def lay(cls, folder: Path, channels: Channels = NO_CHANNELS) -> Given:
        """Make the artifacts."""
        given = cls(folder)
        zoo.release(zoo.Specimen("llama", "llama").model(layers=4), given.release / "model")
        (given.release / "model/README.md").write_text("---\nlicense: mit\n---\n")
        for artifact in (given.windows, given.selection):
            artifact.mkdir()
        save_file({"windows": counting(12).int()}, given.windows / "windows.safetensors")
        Selection(method="sleb", removed=(1,), order=(1,), channels=channels).save(given.selection)
        return given

    @property
    def release(self) -> Path:
        return self.folder / "release"

    @property
    def windows(self) -> Path:
        return self.folder / "windows"

    @property
    def selection(self) -> Path:
        return self.folder / "selection"

    def perplexity(self, artifact: Path, without: tuple[int, ...] = (), channels: Channels = NO_CHANNELS) -> float:
        """The perplexity of an artifact's model on the windows, some of its layers skipped and some channels gated to 0."""
        model = load_model(artifact / "model")
        with skipped(model, without), narrowed(model, channels):
            return perplexity(model, counting(12))


class SeveralKept:
    """Checkpoints of several trainings, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, dict[str, Kept]()

    def scoped(self, name: str) -> Kept:
        """The checkpoints of one training."""
        return self.kept.setdefault(name, Kept(self.folder / name))


def weights(artifact: Path) -> dict[str, torch.Tensor]:
    """The weights of an artifact's model as they are on disk."""
    return load_file(artifact / "model/model.safetensors")


def digest(folder: Path) -> str:
    """A digest of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
