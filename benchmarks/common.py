"""What the benchmarks share: the recipe's sections, the texts and a file of figures that grows as they come."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.methods.sleb import Sleb
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.training.journal import Silent
from components.lib.transformer.checkpoint import PrunableCheckpoint, load_model, load_tokenizer
from components.lib.transformer.device import raise_weights
from components.lib.transformer.gates import bypassed
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import NOTHING, Selection
from components.lib.transformer.surgery import cut_checkpoint
from components.lib.transformer.text import consecutive_windows, draw_windows, read_documents, token_stream


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every benchmark."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    arguments.add_argument("--calibration", type=Path, required=True, help="the text that chooses and trains")
    arguments.add_argument("--test", action="append", required=True, metavar="NAME=FILE", help="a text to report on")
    arguments.add_argument("--samples", type=int, default=480, help="calibration windows")
    arguments.add_argument("--length", type=int, default=256, help="tokens of a window")
    arguments.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--test-windows", type=int, help="report on the first windows of each text only")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the recipe")
    arguments.add_argument("--out", type=Path, required=True, help="the JSON file of figures; what it holds is kept")
    return arguments


def _loaded(folder: Path) -> PreTrainedModel:
    """Load a model as the stages compute with it."""
    model = load_model(folder)
    raise_weights(model)
    return model


@dataclass
class Bench:
    """One benchmark's inputs, opened."""

    arguments: argparse.Namespace

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.arguments.model)
        self.stream = self._stream(self.arguments.calibration)
        tests = dict(named.split("=", 1) for named in self.arguments.test)
        self.tests = {
            name: consecutive_windows(self._stream(Path(path)), self.arguments.length)[: self.arguments.test_windows]
            for name, path in tests.items()
        }

    def _stream(self, path: Path) -> Tensor:
        return token_stream(read_documents(path), self.tokenizer)

    def model(self) -> PreTrainedModel:
        """Load the dense model."""
        return _loaded(self.arguments.model)

    def count(self, ratio: float) -> int:
        """Return how many layers a ratio removes."""
        return Sleb(ratio=ratio).count(PrunableCheckpoint.open(self.arguments.model).layers)

    def windows(self, seed: int) -> Tensor:
        """Draw the calibration windows (samples, length) of a seed."""
        return draw_windows(self.stream, self.arguments.samples, self.arguments.length, seed)

    def recipe(self, *overrides: str) -> Recipe:
        """Return the default recipe with the command's fields, then the given ones, in their place."""
        base = "{methods: {trsp: {ratio: 0.25}, dress: {ratio: 0.25}}, calibration: {data: unused.txt}, evaluate: {perplexity: {unused: unused.txt}}}"
        return parse_recipe(base, [*self.arguments.set, *overrides])

    def cut(self, selection: Selection) -> PreTrainedModel:
        """Load the dense model without what was selected."""
        with tempfile.TemporaryDirectory() as folder:
            cut_checkpoint(self.arguments.model, Path(folder), selection.removed, selection.channels)
            return _loaded(Path(folder))

    def perplexities(self, model: PreTrainedModel, without: Selection = NOTHING) -> dict[str, float]:
        """Return the model's perplexity on every test text, computed as it will be once `without` is cut."""
        with bypassed(model, without.removed), narrowed(model, without.channels):
            return {name: perplexity(model, windows) for name, windows in self.tests.items()}

    def conditions(self) -> dict[str, Any]:
        """What a figure may not travel without: data, context length, versions."""
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self._files()}
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        shown = {name: str(value) for name, value in vars(self.arguments).items() if name not in ("out", "model")}
        return {"arguments": shown, "sha256": digests, "tokens": self._tokens(), "versions": versions}

    def _files(self) -> list[Path]:
        texts = [Path(named.split("=", 1)[1]) for named in self.arguments.test]
        return [self.arguments.model / "model.safetensors", self.arguments.calibration, *texts]

    def _tokens(self) -> dict[str, int]:
        return {name: windows.numel() for name, windows in self.tests.items()}


class Figures:
    """A JSON file of figures by name, written after each one, so that a benchmark that was stopped goes on."""

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self.path = path
        held = json.loads(path.read_text()) if path.exists() else {}
        self.figures: dict[str, Any] = held.get("figures", {})
        self.conditions = dict(conditions)

    def get(self, name: str, make: Callable[..., Any], *inputs: Any) -> Any:
        """Return the figure of that name, made now from the inputs where there is none yet."""
        if name not in self.figures:
            start = time.monotonic()
            self.figures[name] = make(*inputs)
            self.write()
            print(f"{name}: {json.dumps(self.figures[name])} ({time.monotonic() - start:.0f} s)", flush=True)
        return self.figures[name]

    def write(self, **more: Any) -> None:
        """Write the figures, and what is made of them, with their conditions."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        everything = {"conditions": self.conditions, "figures": self.figures} | more
        self.path.write_text(json.dumps(everything, indent=2) + "\n")


class Losses(Silent):
    """Prints the loss now and then."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Print every tenth step's."""
        if step % 10 == 0:
            print("   ", step, {name: round(value, 4) for name, value in values.items()}, flush=True)
