"""The differences between two registered versions: release, recipe, data, code, libraries, what was removed, and figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from components.lib.differences import changed, flat
from components.lib.errors import Refusal
from components.lib.store.store import Store
from components.lib.tracking.registry import Version
from components.register.format import ABSENT, count, number, percent, times
from components.register.measured import SPEEDS, Context, Measured, figure, ratio, unlike
from components.register.report import Report

SHORT = 12
"""Digits of a digest that are shown."""


@dataclass(frozen=True)
class Change:
    """One difference."""

    part: str
    """`release`, `recipe`, `data`, `code`, `library`, `removed` or `figure`."""
    name: str
    before: str
    now: str
    note: str = ""
    """The ratio of a figure, or why the two figures cannot be compared."""


def report_of(version: Version, store: Store) -> Report:
    """Return the report of the run that registered the version. Raises Refusal if it is not in the store."""
    run = version.tags.get("espalier.run", "")
    text = store.read_text(f"runs/{run}/report.json") if run else None
    if text is None:
        raise Refusal(
            f"version {version.version} of {version.name} has no report in the store {store.uri()}: name the store that its run used (ESPALIER_BUCKET)"
        )
    return Report.model_validate_json(text)


def changes(before: Report, now: Report) -> list[Change]:
    """Return every difference between two versions; of the figures, those of the two candidates."""
    return [
        *_changes("release", before.release.model_dump(), now.release.model_dump()),
        *_changes("recipe", _settings(before), _settings(now)),
        *_changes("data", _data(before), _data(now)),
        *_changes("code", before.environment.get("code", {}), now.environment.get("code", {})),
        *_changes("library", before.environment.get("versions", {}), now.environment.get("versions", {})),
        *_changes("removed", _removed(before), _removed(now)),
        *_figures(before, now),
    ]


def _changes(part: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[Change]:
    for name, one, other in changed(flat(before), flat(now)):
        yield Change(part, name, _shown(one), _shown(other))


def _settings(report: Report) -> dict[str, Any]:
    """Return the recipe's fields without the texts, which count by their digests."""
    texts = {f"{dotted}.path" for dotted, _ in report.parsed_recipe().texts()}
    return {name: value for name, value in flat(report.recipe).items() if name not in texts}


def _data(report: Report) -> dict[str, str]:
    texts = report.environment.get("texts", {})
    return {name: str(path).rpartition("@sha256:")[2] for name, path in texts.items()}


def _removed(report: Report) -> dict[str, str]:
    counts: dict[str, str] = {removal.axis: f"{removal.removed} of {removal.before}" for removal in report.removals()}
    layers = {"layers": ", ".join(map(str, report.selection.removed))} if report.selection.removed else {}
    return {**counts, **layers}


def _figures(before: Report, now: Report) -> Iterator[Change]:
    contexts = [Context.model_validate(report.environment) for report in (before, now)]
    one, other = before.candidate, now.candidate
    for name, part, shown in _measured(one, other):
        values = [found.value if (found := figure(model, name, part)) else None for model in (one, other)]
        if values[0] == values[1]:
            continue
        note = unlike(name, part, contexts[1], contexts[0]) or times(ratio(values[1], values[0]))
        before_, now_ = (ABSENT if value is None else shown(value) for value in values)
        yield Change("figure", f"{name.replace('_', ' ')} {part}".strip(), before_, now_, note)


def _measured(one: Measured, other: Measured) -> Iterator[tuple[str, str, Any]]:
    """Yield every figure that one of the two models may have: its name, its text, task or batch size, and its format."""
    models = (one, other)
    for text in dict.fromkeys(text for model in models for text in model.perplexity):
        yield "perplexity", text, number
    for task in dict.fromkeys(task for model in models for task in model.tasks):
        yield "accuracy", task, percent
    for size in ("parameters", "bytes", "peak_memory"):
        yield size, "", count
    for phase in SPEEDS:
        for batch in dict.fromkeys(batch for model in models for batch in model.speed.get(phase, {})):
            yield phase, batch, number


def _shown(value: Any) -> str:
    """Format a value; of a digest, its first digits."""
    text = ABSENT if value is None else str(value)
    return text[:SHORT] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
