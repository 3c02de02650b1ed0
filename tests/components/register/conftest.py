"""A run as it comes: the folders the stages leave, with the numbers of a small Llama cut from 12 layers to 9."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from components.lib.recipe.loading import parse_recipe
from components.lib.transformer.layout import Widths
from components.lib.transformer.selection import Channels, Selection
from components.register.report import Curves, Report, build, read_curves

BATCHES = ("1", "8", "64")
REMOVED = (9, 7, 4)
WIDTHS = Widths(hidden=256, ffn=684, heads=8, groups=4, head=32)
GATES = (0.93, 0.71, 0.62, 0.58, 0.31, 0.52, 0.49, 0.27, 0.47, 0.22, 0.55, 0.78)
WITHOUT = (0.0, 0.0, 0.0, 0.0, 77.9, 0.0, 79.2, 71.3, 74.8, 69.6, 0.0, 0.0)


def speed(prefill: float, decode: float, noise: random.Random) -> dict[str, Any]:
    """Throughput by phase and batch, given tokens a second at batch 1 of each."""
    phases = {"prefill": (prefill, 512), "decode": (decode, 32)}
    return {
        phase: {batch: throughput(base, tokens, int(batch), noise) for batch in BATCHES}
        for phase, (base, tokens) in phases.items()
    }


def throughput(base: float, tokens: int, batch: int, noise: random.Random) -> dict[str, float]:
    rate = base * batch**0.55 * noise.uniform(0.985, 1.015)
    latency = 1000 * tokens * batch / rate
    return {"tokens_per_second": rate, "latency_ms_p50": latency, "latency_ms_p90": latency * 1.04}


def model(layers: int, perplexity: dict[str, float], pace: float, widths: Widths = WIDTHS) -> dict[str, Any]:
    attention = 2 * widths.hidden * widths.head * (widths.heads + widths.groups)
    parameters = 8193 * widths.hidden + layers * (attention + 3 * widths.hidden * widths.ffn + 2 * widths.hidden)
    return {
        "parameters": parameters,
        "bytes": 2 * parameters,
        "layers": layers,
        "widths": asdict(widths),
        "perplexity": perplexity,
        "tasks": {},
        "prefill_flops": 1024 * parameters,
        "notes": [],
        "speed": speed(9_800 * pace, 41 * pace, random.Random(layers + int(1000 * pace))),
    }


def measurements(layers: int = 9, widths: Widths = WIDTHS) -> dict[str, Any]:
    """The `models` of an evaluation, as the run of the reference model has them."""
    return {
        "dense": model(12, {"wikitext2": 59.41, "technical": 227.3}, 1.0),
        "candidate": model(layers, {"wikitext2": 58.72, "technical": 259.1}, 1.29, widths),
        "champion": model(10, {"wikitext2": 63.05, "technical": 251.8}, 1.17),
        "pruned-first": model(layers, {"wikitext2": 60.24, "technical": 269.0}, 1.288, widths),
        "dense-trained": model(12, {"wikitext2": 56.83, "technical": 231.4}, 1.001),
    }


RECIPE = """
methods: {trsp: {ratio: 0.25}}
calibration: {data: data/wikitext2/calibration.txt, samples: 128, length: 256}
regularize: {steps: 100}
evaluate:
  perplexity: {wikitext2: data/wikitext2/test.txt, technical: data/technical/heldout.txt}
  controls: [pruned-first, dense-trained]
promote:
  rules:
    quality: {figure: perplexity, bound: 1.15, why: the answers must stay close}
    control: {figure: perplexity, against: pruned-first, bound: 1.0, why: to train before the cut must pay}
    champion: {figure: perplexity, against: champion, bound: 1.05, why: what is in service is as good}
    size: {figure: parameters, bound: 0.8, why: it must be smaller}
    prefill: {figure: prefill, bound: 1.2, why: it must be faster}
"""

CONTROL = next(line for line in RECIPE.splitlines(keepends=True) if line.startswith("    control: "))
"""The rule on the control that was cut first."""


def with_methods(**methods: str) -> str:
    """The recipe of the run with other methods, each with its settings as YAML."""
    chosen = ", ".join(f"{name}: {settings}" for name, settings in methods.items())
    return RECIPE.replace("methods: {trsp: {ratio: 0.25}}", f"methods: {{{chosen}}}")


RELEASE = {"source": "models/reference-llama", "revision": None, "digest": "sha256:" + "3f9a41c27be0" * 5 + "77d1"}
REGISTERED = {
    "name": "reference-llama-25",
    "version": "3",
    "aliases": ("challenger",),
    "source": "s3://espalier/prune/7be03f9a41c2/model",
}
TIMING = {
    "pin": 0.6,
    "calibrate": 2.1,
    "learn_gates": 61.3,
    "regularize": 204.8,
    "prune": 6.2,
    "evaluate": 148.0,
    "total": 441.9,
}
ENVIRONMENT = {
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "espalier": "0.1.0"},
    "hardware": "2 cores, Intel Xeon (AMX), 24 GiB",
    "code": "860b5e5",
    "seed": 0,
    "length": 256,
    "data": {"calibration": "sha256:" + "ab" * 32, "wikitext2": "sha256:" + "cd" * 32},
}


CONTEXT = {"length": 256, "versions": {"lm_eval": "0.4.9"}, "speed": {"prompt": 512, "generate": 32}}
"""How the models were measured."""


def trajectory() -> list[dict[str, Any]]:
    """Three rounds of twelve steps: the gates fall from 1 towards their last values; one that went is at 0."""
    noise, lines = random.Random(1), []
    for step in range(36):
        part, gone = min(1.0, (step + 1) / 30), REMOVED[: step // 12]
        now = [1 - (1 - end) * (part if end > 0.4 else part**1.7) + noise.uniform(-0.012, 0.012) for end in GATES]
        gates = [0.0 if layer in gone else gate for layer, gate in enumerate(now)]
        lines.append({"round": step // 12, "step": step + 1, "gates": gates})
    return lines


def losses(steps: int, start: float, end: float, names: tuple[str, ...], seed: int) -> list[dict[str, float]]:
    noise = random.Random(seed)
    return [
        {"step": step, "learning_rate": 1e-4 * (1 - step / steps)}
        | {
            name: (end + (start - end) * math.exp(-step / 18)) / (i + 1) + noise.gauss(0, 0.06)
            for i, name in enumerate(names)
        }
        for step in range(1, steps + 1)
    ]


def slices(step: float, channels: Channels) -> dict[str, float]:
    """The norms of the cut slices, each part of the model at a pace of its own while the gates go from 1 to 0."""
    parts = {"hidden": ("attention", "ffn", "rest"), "ffn": ("ffn",), "heads": ("attention",)}
    paces = {"attention": 0.002, "ffn": 0.006, "rest": -0.001}
    cut = dict.fromkeys(part for axis in channels.axes for part in parts[axis])
    return {f"slices_{part}": max(0.0, 1 - (step - 1) / 15) * (1 - paces[part] * step) for part in cut}


def recovery() -> list[dict[str, float]]:
    """Sixty steps of LoRA, the held-out windows looked at every twenty."""
    looks = [{"step": step, "validation": 61.2 - 1.9 * (1 - math.exp(-step / 15))} for step in (0, 20, 40, 60)]
    return [*losses(60, 4.1, 4.0, ("loss",), 3), *looks]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


LAYERS = Selection(
    method="trsp",
    removed=tuple(sorted(REMOVED)),
    order=REMOVED,
    scores={"gate": GATES, "perplexity": WITHOUT},
)
CHANNELS = Selection(
    method="dress",
    channels=Channels(
        hidden=tuple(range(0, 256, 4)), ffn=tuple(tuple(range(layer, layer + 3 * 172, 3)) for layer in range(12))
    ),
)
BOTH = LAYERS.model_copy(update={"method": "trsp+dress", "channels": Channels(ffn=CHANNELS.channels.ffn)})


def write_run(folder: Path, models: dict[str, Any] | None = None, selection: Selection = LAYERS) -> Path:
    """Leave what the stages leave, in a folder each."""
    for name in ("selection", "evaluation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    selection.save(folder / "selection")
    if selection.removed:
        write_lines(folder / "selection" / "trajectory.jsonl", trajectory())
    training = losses(100, 4.62, 4.05, ("loss", "lm", "kl", "state"), 2)
    for line in training:
        line |= slices(line["step"], selection.channels)
    write_lines(folder / "regularize" / "metrics.jsonl", training)
    write_lines(folder / "recover" / "metrics.jsonl", recovery())
    found = {"models": measurements() if models is None else models, "context": CONTEXT}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(found))
    return folder


def build_report(folder: Path, recipe: str = RECIPE, **changed: Any) -> Report:
    given: dict[str, Any] = {
        "release": RELEASE,
        "registered": REGISTERED,
        "timing": TIMING,
        "environment": ENVIRONMENT,
        "recipe": parse_recipe(recipe),
        "selection": folder / "selection",
        "evaluation": folder / "evaluation",
    }
    return build(**(given | changed))


NARROWER = {"hidden+ffn": replace(WIDTHS, hidden=192, ffn=512), "layers+ffn": replace(WIDTHS, ffn=512)}


def build_channels(folder: Path, **changed: Any) -> Report:
    """The report of a run that cut hidden and ffn, and no layer."""
    write_run(folder, measurements(12, NARROWER["hidden+ffn"]), CHANNELS)
    recipe = with_methods(dress="{ratio: 0.25, axes: [hidden, ffn]}")
    return build_report(folder, recipe, **changed)


def build_both(folder: Path) -> Report:
    """The report of a run that cut layers, and ffn of those that stay."""
    write_run(folder, measurements(9, NARROWER["layers+ffn"]), BOTH)
    return build_report(folder, with_methods(trsp="{ratio: 0.25}", dress="{ratio: 0.25}"))


def curves_of(folder: Path, recipe: str = RECIPE) -> Curves:
    return read_curves(
        parse_recipe(recipe),
        selection=folder / "selection",
        regularize=folder / "regularize",
        recover=folder / "recover",
    )


@pytest.fixture
def models() -> dict[str, Any]:
    """The measurements, to be changed at will."""
    return measurements()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folders of a run: selection, regularize, recover, evaluation."""
    return write_run(tmp_path)


@pytest.fixture
def report(run: Path) -> Report:
    """The run's report."""
    return build_report(run)


@pytest.fixture
def rewrite(run: Path) -> Callable[[dict[str, Any]], Report]:
    """Give the run other measurements, and report it anew."""
    return lambda models: build_report(write_run(run, models))
