"""The headline of the report: the verdict in a word and a sentence, the controls, and the numbers that matter most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.register.format import ABSENT, count, number, times
from components.register.measured import ratio
from components.register.report import Report
from components.register.sections.section import Cell


def headline(report: Report) -> Mapping[str, Any]:
    """Return what `headline.html.j2` reads."""
    dense, candidate = report.dense, report.candidate
    return {
        "outcome": "fail" if not report.verdict.passed else "pass" if report.verdict.rules else "",
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
    """Say how many rules hold, and name those that do not."""
    rules, failed = report.verdict.rules, report.verdict.failed
    if not rules:
        return "no rules were asked for"
    if not failed:
        return "the one rule holds" if len(rules) == 1 else f"all {len(rules)} rules hold"
    return f"{len(failed)} of {len(rules)} rules broken: {', '.join(rule.name for rule in failed)}"


def _speedups(report: Report, phase: str) -> Cell:
    """Return the range of a phase's speed-ups over the batch sizes."""
    batches = list(report.candidate.speed[phase])
    found = [
        ratio(report.candidate.tokens_per_second(phase, batch), report.dense.tokens_per_second(phase, batch))
        for batch in batches
    ]
    measured = [value for value in found if value is not None]
    span = sorted({times(value, 2) for value in (min(measured), max(measured))}) if measured else [ABSENT]
    return Cell(" to ".join(span), f"{phase}, batch {', '.join(batches)}")
