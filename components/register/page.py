"""The report as one self-contained page: no request, no script; for a screen, a phone, paper and Kubeflow's frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from components.lib.recipe.schema import Recipe
from components.lib.transformer.channels import ALIGNED
from components.lib.transformer.removal import NOUNS, Removal, in_words, percent
from components.register import figures
from components.register.measured import Measured, differing, ratio
from components.register.report import Curve, Curves, Report
from components.register.verdict import Rule

ABSENT = "–"

SCORES = {
    "gate": "the layer's gate, when it went or at the end",
    "block_influence": "the layer's Block Influence (1 − mean cosine between what enters and what leaves it)",
    "perplexity": "perplexity on the calibration text without the layer, when last measured",
}
"""What a method's score of a layer is; a name that is not here stands for itself. In each, low is little needed."""

METRICS = {
    "lm": "LM loss",
    "kl": "KL divergence from the dense model",
    "state": "distance to the dense model's final state",
    "penalty": "relative norm of f(x) − x, removed layers",
    "validation": "perplexity on the held-out windows",
}
"""What a curve shows; a name that is not here stands for itself."""

ABOUT = {
    "dense": "the release as it came",
    "candidate": "the pruned model this report is about",
    "champion": "the model in service now",
    "pruned-first": "control: the same cut made first, then trained as the candidate was",
    "dense-trained": "control: nothing cut, trained as the candidate was",
}

AXES = {
    "layers": "whole transformer layers",
    "hidden": "channels of the residual stream, in every tensor that reads or writes it",
    "ffn": "intermediate channels of each layer's feed-forward network",
    "heads": "key-value groups of each layer, with the query heads that read them",
}
"""What an axis is."""

CHOSEN = {
    "random": "drawn at random",
    "magnitude": "those of the smallest weights",
    "activation": "those of the smallest weights × activations on the calibration windows",
}
"""Which channels DReSS's choices take."""

PARTS = {"attention": "attention", "ffn": "feed-forward", "rest": "embeddings, head and norms"}
"""The parts of the model whose slices are told apart, as in the curve `slices_attention`."""

_SLICES = {f"slices_{part}": part for part in PARTS}

BACKSTAGE = ("learning_rate", "gradient_norm")
"""Metrics that say how the training ran rather than what came of it: left to MLflow."""


class Cell(NamedTuple):
    """A number, and beneath it the comparison it is to be read with."""

    number: str
    beside: str = ""
    more: str = ""


@dataclass(frozen=True)
class Layer:
    """A box of the strip of layers."""

    index: int
    scores: list[str]
    height: int
    """Per cent of the tallest."""
    removed: int | None
    """1 for the first layer removed; None for a layer that stays."""


def render(report: Report, curves: Curves) -> str:
    """Return the page. The same report and curves give the same page."""
    recipe = Recipe.model_validate(report.recipe)
    return _template().render(
        report=report,
        title=_title(report),
        headline=headline(report),
        rules=[(rule, rule.note or _against(rule)) for rule in report.verdict.rules],
        about=ABOUT | AXES,
        columns=columns(report),
        quality=quality(report),
        speed=speed(report.models()),
        notes=list(notes(report, recipe)),
        promised=times(ratio(report.dense.prefill_flops, report.candidate.prefill_flops), 2),
        pareto=_pareto(report),
        taken=in_words(report.removals()),
        axes=axes(report, recipe) if report.selection.channels else [],
        chosen=CHOSEN[recipe.dress.channels],
        layers=layers(report) if report.selection.removed else [],
        scored=[SCORES.get(name, name) for name in _scored(report)],
        gates=_gates(report, curves),
        training=_training(curves.regularize, _mark(recipe)),
        slices=_slices(curves.regularize, recipe),
        recovery=_training(curves.recover, None),
        stages=sum(_stages(report).values()),
        timing=_stages(report),
        environment=[(name, list(_flat(value))) for name, value in report.environment.items()],
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
    )


def _title(report: Report) -> str:
    registered = report.registered
    return f"{registered.name} version {registered.version}" if registered else "Not registered"


def _stages(report: Report) -> dict[str, float]:
    """Seconds by stage, without the run's total."""
    return {stage: took for stage, took in report.timing.items() if stage != "total"}


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, count=count, times=times, seconds=seconds)
    return environment.get_template("report.html.j2")


# Numbers as a person reads them


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits, four unless told, thousands apart: 59.38, 227.1, 12,345.

    >>> number(7.0801), number(1234.5), number(0.058, 3), number(None)
    ('7.080', '1,234', '0.0580', '–')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(0, decimals), 6)}f}"


def count(value: float) -> str:
    """A count or a size with its decimal prefix: 10.82 M.

    >>> count(10_815_744), count(999), count(6.74e9)
    ('10.82 M', '999', '6.740 G')
    """
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{number(value / size)} {prefix}"
    return f"{value:g}"


def times(value: float | None, digits: int = 3) -> str:
    """A ratio: 0.988×."""
    return ABSENT if value is None else f"{value:.{digits}f}×"


def seconds(value: float) -> str:
    """A duration: 8.2 s, 3 min 05 s, 2 h 14 min.

    >>> seconds(8.21), seconds(185), seconds(8040)
    ('8.2 s', '3 min 05 s', '2 h 14 min')
    """
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# The parts of the page


def headline(report: Report) -> dict[str, Any]:
    """The verdict in a word and a sentence, and the numbers that matter with what they are compared with."""
    dense, candidate = report.dense, report.candidate
    return {
        "word": "Pass" if report.verdict.passed else "Fail",
        "sentence": verdict_sentence(report),
        "size": Cell(
            times(ratio(candidate.parameters, dense.parameters)),
            f"{count(candidate.parameters)} parameters against {count(dense.parameters)}",
        ),
        "bytes": f"{count(candidate.bytes)}B against {count(dense.bytes)}B",
        "perplexity": {
            text: Cell(
                times(ratio(value, dense.perplexity.get(text))),
                f"{number(value)} against {number(dense.perplexity.get(text))}",
            )
            for text, value in candidate.perplexity.items()
        },
        "speed": {phase: _speedups(report, phase) for phase in candidate.speed},
    }


def verdict_sentence(report: Report) -> str:
    """Say which rules decided."""
    rules, failed = report.verdict.rules, report.verdict.failed
    if not rules:
        return "no rules were asked for"
    if not failed:
        return "the one rule holds" if len(rules) == 1 else f"all {len(rules)} rules hold"
    return f"{len(failed)} of {len(rules)} rules broken: {', '.join(rule.name for rule in failed)}"


def _speedups(report: Report, phase: str) -> Cell:
    """The span of a phase's speed-ups over the batch sizes."""
    batches = list(report.candidate.speed[phase])
    found = [
        ratio(report.candidate.tokens_per_second(phase, batch), report.dense.tokens_per_second(phase, batch))
        for batch in batches
    ]
    measured = [value for value in found if value is not None]
    span = sorted({times(value, 2) for value in (min(measured), max(measured))}) if measured else [ABSENT]
    return Cell(" to ".join(span), f"{phase}, batch {', '.join(batches)}")


def _against(rule: Rule) -> str:
    """The two numbers a rule compares: "58.72 against 59.41 (dense)"."""
    (_, value), (opponent, base) = rule.compared.items()
    return f"{_whole(value)} against {_whole(base)} ({opponent})"


def _whole(value: float | None) -> str:
    return count(value) if value is not None and value >= 1e6 else number(value)


def columns(report: Report) -> list[Cell]:
    """The heads of the quality table: a name, and beneath it what the number is."""
    texts, tasks = _measured_on(report)
    return [
        *(Cell(NOUNS[axis].removesuffix(" a layer")) for axis in differing(report.models().values())),
        *(Cell(name) for name in ("parameters", "size")),
        *(Cell(text, "perplexity") for text in texts),
        *(Cell(task, "accuracy") for task in tasks),
    ]


def quality(report: Report) -> list[tuple[str, list[Cell]]]:
    """The rows of the quality table: a model, and its numbers in the order of `columns`, each beside the dense model's."""
    texts, tasks = _measured_on(report)
    dense, axes = report.dense, differing(report.models().values())
    return [
        (
            name,
            [
                *(_whole_of(model.along(axis), dense.along(axis)) for axis in axes),
                Cell(count(model.parameters), times(ratio(model.parameters, dense.parameters))),
                Cell(f"{count(model.bytes)}B", times(ratio(model.bytes, dense.bytes))),
                *(_compared(model.perplexity.get(text), dense.perplexity.get(text)) for text in texts),
                *(_accuracy(model.tasks.get(task), dense.tasks.get(task)) for task in tasks),
            ],
        )
        for name, model in report.models().items()
    ]


def _measured_on(report: Report) -> tuple[list[str], list[str]]:
    """The names of the texts and of the tasks that any model was measured on."""
    models = report.models().values()
    return list(_union(model.perplexity for model in models)), list(_union(model.tasks for model in models))


def _compared(value: float | None, base: float | None) -> Cell:
    return Cell(number(value), times(ratio(value, base)) if value is not None else "")


def _whole_of(found: int | None, base: int | None) -> Cell:
    return Cell(ABSENT if found is None else f"{found:,}", ABSENT if base is None else f"of {base:,}")


def _accuracy(found: Any, base: Any) -> Cell:
    """A task's accuracy in per cent, and the points it lies above or below the dense model's."""
    value, dense = task_accuracy(found), task_accuracy(base)
    if value is None:
        return Cell(ABSENT)
    return Cell(f"{value:.1%}", f"{100 * (value - dense):+.1f} points" if dense is not None else "")


def task_accuracy(found: Any) -> float | None:
    """Return a task's accuracy, whether it is written as a number or among others by name; normalised where there is one."""
    if isinstance(found, Mapping):
        found = next((found[name] for name in ("accuracy", "acc_norm", "acc") if found.get(name) is not None), None)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def speed(models: Mapping[str, Measured]) -> list[tuple[str, list[str], list[tuple[str, list[Cell]]]]]:
    """The speed tables: a phase, its batch sizes, and a row a model that was measured."""
    dense = models["dense"]
    tables = []
    for phase in _union(model.speed for model in models.values()):
        batches = list(_union(model.speed.get(phase, {}) for model in models.values()))
        rows = [
            (name, [_pace(model, dense, phase, batch) for batch in batches])
            for name, model in models.items()
            if model.speed.get(phase)
        ]
        tables.append((phase, batches, rows))
    return tables


def _pace(model: Measured, dense: Measured, phase: str, batch: str) -> Cell:
    found = model.speed[phase].get(batch)
    if found is None:
        return Cell(ABSENT)
    speedup = times(ratio(found.tokens_per_second, dense.tokens_per_second(phase, batch)), 2)
    latency = f"{number(found.latency_ms_p50)} / {number(found.latency_ms_p90)} ms"
    return Cell(number(found.tokens_per_second), speedup, latency)


def notes(report: Report, recipe: Recipe) -> Iterator[str]:
    """What a reader must know before believing the numbers (the paper's missing controls); only what applies here."""
    for name, model in report.models().items():
        yield from (f"{name}: {note}." for note in model.notes)
    trained = recipe.regularize.schedule != "none" or recipe.recover.enabled
    if trained:
        yield from _adaptation(report, recipe)
    if trained and "pruned-first" not in report.controls:
        yield (
            "No control was cut first and then trained, so nothing here tells what training before the cut "
            "brought over training after it: add pruned-first to evaluate.controls."
        )
    if len(report.candidate.perplexity) == 1:
        yield "Only one text was measured: nothing here tells how the model does on text of another domain."


def _adaptation(report: Report, recipe: Recipe) -> Iterator[str]:
    """Training on a text also adapts the model to it; the dense model with the same training shows by how much."""
    control = report.controls.get("dense-trained")
    near = [name for name, text in recipe.evaluate.perplexity.items() if _same_source(recipe, name)]
    if control is None:
        where = f"({', '.join(near)} here) " if near else ""
        yield (
            f"Training on the calibration text also adapts the model to text of its kind, so a low perplexity there {where}"
            "alone proves little. The control that would show how much, the dense model with the same training, was not "
            "asked for: add dense-trained to evaluate.controls."
        )
        return
    moved = {text: ratio(value, report.dense.perplexity.get(text)) for text, value in control.perplexity.items()}
    told = ", ".join(f"{times(value)} on {text}" for text, value in moved.items() if value is not None)
    if told:
        yield (
            f"The same training moves the dense model's own perplexity to {told}. Below 1 is adaptation to text like the "
            "calibration text, above 1 is forgetting; the candidate's numbers contain both."
        )


def _same_source(recipe: Recipe, name: str) -> bool:
    """Whether a text lies beside the calibration text or in the same Hub data set, hence of its domain."""
    text, calibration = recipe.evaluate.perplexity[name], recipe.calibration.data
    if text.hub or calibration.hub:
        return text.hub == calibration.hub and text.config == calibration.config
    path, beside = text.path or "", calibration.path or ""
    # An object's place in the store is its digest: nothing of where it came from.
    return path == beside or ("s3://" not in path + beside and Path(path).parent == Path(beside).parent)


def axes(report: Report, recipe: Recipe) -> list[tuple[str, list[Cell]]]:
    """The rows of the table of what was cut: an axis; before and after, the part that went, and what was asked for."""
    return [
        (
            removal.axis,
            [
                Cell(f"{removal.before:,}"),
                Cell(f"{removal.after:,}"),
                Cell(percent(removal.part), f"{removal.removed:,}"),
                _asked(removal, recipe),
            ],
        )
        for removal in report.removals()
    ]


def _asked(removal: Removal, recipe: Recipe) -> Cell:
    """The part that the recipe asks for, and why another one went."""
    target = recipe.target.ratio
    asked = target if removal.axis == "layers" else recipe.dress.ratios(target).get(removal.axis)
    if asked is None:
        other = "heads" if removal.axis == "hidden" else "hidden"
        return Cell(ABSENT, f"shrinks with {other} in this family")
    return Cell(percent(asked), _rounded(removal, recipe) if abs(removal.part - asked) > 5e-4 else "")


def _rounded(removal: Removal, recipe: Recipe) -> str:
    """Say what a part was rounded to."""
    multiple = recipe.dress.multiple or ALIGNED
    if removal.axis in ("hidden", "ffn") and removal.after % multiple == 0:
        return f"rounded: a multiple of {multiple} stays"
    whole = {"layers": "layers", "heads": "key-value groups"}.get(removal.axis, "heads, with which it shrinks")
    return f"rounded to whole {whole}"


def layers(report: Report) -> list[Layer]:
    """The strip: every layer of the dense model with its scores, and the order in which the removed ones went."""
    scores = [[score or None for score in report.selection.scores[name]] for name in _scored(report)]
    heights = _heights(scores[0]) if scores else [0] * report.dense.layers
    order = {layer: place for place, layer in enumerate(report.selection.order, start=1)}
    return [
        Layer(index, [number(score[index], 3) for score in scores], height, order.get(index))
        for index, height in enumerate(heights)
    ]


def _scored(report: Report) -> list[str]:
    """The names of the scores the strip shows: those with a number for each layer."""
    return [name for name, values in report.selection.scores.items() if len(values) == report.dense.layers]


def _heights(scores: Sequence[float | None]) -> list[int]:
    """Bars from 8 to 100 per cent; over logarithms where one score dwarfs the others, as the first layer's often does."""
    known = [score for score in scores if score is not None and math.isfinite(score)]
    if not known:
        return [0] * len(scores)
    logarithmic = min(known) > 0 and max(known) > 20 * min(known)
    scale = math.log if logarithmic else float
    low, high = scale(min(known)), scale(max(known))
    return [
        round(8 + 92 * (scale(score) - low) / ((high - low) or 1)) if score is not None and math.isfinite(score) else 0
        for score in scores
    ]


def _pareto(report: Report) -> list[Markup]:
    texts = [text for text in report.dense.perplexity if ratio(report.dense.perplexity[text], 1.0)]
    return [Markup(figures.pareto(report.models(), text)) for text in texts]


def _gates(report: Report, curves: Curves) -> Markup | None:
    return Markup(figures.gates(curves.gates, report.selection.removed)) if curves.gates else None


def _training(curves: Mapping[str, Curve], mark: tuple[float, str] | None) -> list[Markup]:
    """A panel a metric, the loss first; a metric that never changes has nothing to show."""
    shown = [
        name for name in curves if name not in (*BACKSTAGE, *_SLICES) and len({value for _, value in curves[name]}) > 1
    ]
    shown.sort(key=lambda name: name != "loss")
    return [Markup(figures.curve(curves[name], METRICS.get(name, name), mark=mark)) for name in shown]


def _slices(curves: Mapping[str, Curve], recipe: Recipe) -> Markup | None:
    """The norms of what the cut takes away, every part of the model in one panel."""
    parts = {PARTS[part]: curves[name] for name, part in _SLICES.items() if name in curves}
    norm = "squared ℓ2 norm" if recipe.regularize.norm == "l2" else "ℓ1 norm"
    return Markup(figures.slices(parts, f"{norm} of the slices, of its start", mark=_mark(recipe))) if parts else None


def _mark(recipe: Recipe) -> tuple[float, str] | None:
    """The step from which the regularisation is at its full strength; steps are counted from 1 where they are recorded."""
    regularize = recipe.regularize
    if regularize.schedule == "anneal":
        part = regularize.annealing(layers=recipe.methods != ("dress",))
        return round(part * regularize.steps) + 1, "gates at 0"
    if regularize.schedule == "penalty" and regularize.ramp:
        return round(regularize.ramp * regularize.steps) + 1, "full penalty"
    return None


def _union(keys: Any) -> dict[str, None]:
    """The keys of several mappings, each once, in the order they are first met."""
    return {key: None for mapping in keys for key in mapping}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Flatten a setting into (name, value) pairs; a plain value has no name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip())
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    else:
        yield name, ABSENT if value is None else str(value)
