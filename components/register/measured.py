"""The measurements of each model, read back from `evaluation.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator

from components.lib.errors import Refusal
from components.lib.recipe.schema import Recipe
from components.lib.transformer.layout import Widths
from components.lib.transformer.removal import ALONG, Along
from components.register.accuracy import Accuracy, accuracy


def finite(value: Any) -> Any:
    """Return the value, or None for a NaN or an infinity: what is not a finite number was not measured."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Metric = Annotated[float | None, BeforeValidator(finite)]
"""A measured number, None if there is none. NaN and infinities become None, so that a report is plain JSON."""

SPEEDS = ("prefill", "decode", "throughput")
"""The phases of speed; the last one is measured behind a server alone."""


class Throughput(BaseModel):
    """Speed of one phase at one batch size."""

    model_config = ConfigDict(frozen=True)

    tokens_per_second: Metric = None
    latency_ms_p50: Metric = None
    latency_ms_p90: Metric = None
    turns: tuple[float, ...] = ()
    """Tokens per second of each repetition, in which all models took their turn."""

    def spread(self, base: Throughput) -> tuple[float, float] | None:
        """Return the smallest and the largest ratio to another model's throughput in the same repetition; None without repetitions."""
        found = [one / other for one, other in zip(self.turns, base.turns, strict=False) if other]
        return (min(found), max(found)) if found else None


class Measured(BaseModel):
    """One model's numbers. Fields the report does not know are left out of it."""

    model_config = ConfigDict(frozen=True)

    parameters: int
    bytes: int
    layers: int | None
    """None for a model whose config states them under no known name."""
    widths: Widths | None = None
    """None if they are not known."""
    perplexity: dict[str, Metric] = {}
    """By the text's name."""
    tasks: dict[str, dict[str, Metric]] = {}
    """By the task's name: its metrics and their standard errors, as lm-eval names them."""
    speed: dict[str, dict[str, Throughput]] = {}
    """By phase of `SPEEDS`, then by batch size; a phase that was not measured is left out."""
    prefill_flops: int | None = None
    """Floating-point operations of one prompt."""
    peak_memory: int | None = None
    """Bytes of weights, cache and activations at the prefill of the largest batch."""
    continued: dict[str, str] = {}
    """The continuation of each prompt."""
    notes: tuple[str, ...] = ()
    """What the evaluation has to say of its numbers."""

    @field_validator("speed")
    @classmethod
    def _only_measured(cls, speed: dict[str, dict[str, Throughput]]) -> dict[str, dict[str, Throughput]]:
        return {phase: batches for phase, batches in speed.items() if batches}

    def along(self, axis: Along) -> int | None:
        """Return how many layers, or how many channels of another axis, the model has; None if that is not known."""
        if axis == "layers":
            return self.layers
        return self.widths.of(axis) if self.widths else None

    def tokens_per_second(self, phase: str, batch: str) -> float | None:
        """Return the throughput of a phase at a batch size, or None if it was not measured."""
        measured = self.speed.get(phase, {}).get(batch)
        return measured.tokens_per_second if measured else None


def figure(model: Measured, name: str, part: str) -> Accuracy | None:
    """Return a figure of `promote.rules` but mean_accuracy, with its standard error if it has one; None if it was not measured.

    Args:
        model: the model.
        name: the figure.
        part: the text, task or batch size; empty for a figure of the whole model.
    """
    if name == "accuracy":
        return accuracy(model.tasks.get(part))
    value: float | None
    if name == "perplexity":
        value = model.perplexity.get(part)
    elif name in SPEEDS:
        value = model.tokens_per_second(name, part)
    else:
        value = getattr(model, name)
    return None if value is None else Accuracy(float(value))


class Context(BaseModel):
    """How the figures of an evaluation were measured."""

    model_config = ConfigDict(frozen=True)

    length: int | None = None
    """Tokens of a window."""
    digests: dict[str, str] = {}
    """Of each text (hex)."""
    task_limit: int | None = None
    """Examples of a task; all if None."""
    versions: dict[str, str | None] = {}
    """Of the libraries, by name; `lm_eval` is the harness of the tasks."""
    speed: dict[str, Any] = {}
    """The settings of `evaluate.speed`."""
    device: str | None = None
    cpu: str | None = None
    gpu: str | None = None
    threads: int | None = None

    @property
    def machine(self) -> str:
        """The machine in words; empty if it is not recorded."""
        if self.device is None:
            return ""
        return f"{self.gpu or self.cpu or self.device} with {self.threads} threads"

    @classmethod
    def asked(cls, recipe: Recipe) -> Context:
        """Return the context that a recipe asks for; a text that is not pinned has no digest yet."""
        texts = {name: text.path or "" for name, text in recipe.evaluate.perplexity.items()}
        return cls(
            length=recipe.evaluate.length,
            digests={name: path.rpartition("@sha256:")[2] for name, path in texts.items() if "@sha256:" in path},
            task_limit=recipe.evaluate.task_limit,
            speed=recipe.evaluate.speed.model_dump(mode="json"),
        )


def unlike(figure: str, part: str, found: Context, other: Context) -> str:
    """Return why a figure cannot be compared with that of another context; empty if it can.

    Args:
        figure: a figure of `promote.rules`.
        part: the text, task or batch size.
        found: the context that the figure was measured in.
        other: that of the other figure, or the one that a recipe asks for.
    """
    if figure == "perplexity":
        if found.length != other.length:
            return f"measured with windows of {found.length or 'unknown'} tokens, not of {other.length}"
        if part in other.digests and found.digests.get(part) != other.digests[part]:
            return f"measured on another text than {part} is now"
    if figure in ("accuracy", "mean_accuracy"):
        version, wanted = (one.versions.get("lm_eval") for one in (found, other))
        if version is None or (wanted is not None and wanted != version):
            return f"measured with {f'lm-eval {version}' if version else 'an unknown version of lm-eval'}" + (
                f", not {wanted}" if wanted else ""
            )
        if found.task_limit != other.task_limit:
            return f"measured on {found.task_limit or 'all'} examples a task, not on {other.task_limit or 'all'}"
    if figure in SPEEDS:
        backend, wanted = (one.speed.get("backend", "transformers") for one in (found, other))
        if backend != wanted:
            return f"measured with {backend}, not with {wanted}"
    if figure in (*SPEEDS, "peak_memory"):
        for name, unit in (("prompt", "tokens of prompt"), ("generate", "generated tokens")):
            if found.speed.get(name) != other.speed.get(name):
                return f"measured with {found.speed.get(name, 'unknown')} {unit}, not with {other.speed.get(name)}"
    if figure in SPEEDS and other.machine and found.machine != other.machine:
        return f"measured on {found.machine or 'an unknown machine'}, not on {other.machine}"
    return ""


def differing(models: Iterable[Measured]) -> list[Along]:
    """Return the axes along which the models differ; layers if they differ along none."""
    measured = list(models)
    differ = [axis for axis in ALONG if len({model.along(axis) for model in measured} - {None}) > 1]
    return differ or ["layers"]


def names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys of several mappings, each once, in the order in which they first occur."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def ratio(value: float | None, base: float | None) -> float | None:
    """Return value / base, or None if either is missing, not finite or not above 0."""
    if value is None or base is None or not (0 < value < math.inf and 0 < base < math.inf):
        return None
    return value / base


def read_context(folder: Path) -> Context:
    """Read the context of `folder/evaluation.json`."""
    return Context.model_validate(json.loads((folder / "evaluation.json").read_text()).get("context", {}))


def read_evaluation(folder: Path) -> dict[str, Measured]:
    """Read the models of `folder/evaluation.json` by name: dense, candidate, and those of champion and the controls there are.

    Raises:
        Refusal: the dense model or the candidate is missing.
    """
    models: Mapping[str, Any] = json.loads((folder / "evaluation.json").read_text())["models"]
    measured = {name: Measured.model_validate(model) for name, model in models.items() if model is not None}
    for name in ("dense", "candidate"):
        if name not in measured:
            raise Refusal(
                f"{folder / 'evaluation.json'} measured {', '.join(measured) or 'nothing'} but no {name!r} model: run the evaluation again"
            )
    return measured
