"""The headline of the report: the verdict in a word and a sentence, the controls, and the numbers that matter most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.register.accuracy import difference, mean_accuracy
from components.register.format import ABSENT, count, number, percent, times
from components.register.measured import Measured, ratio
from components.register.report import Report
from components.register.searched import target_sentence
from components.register.sections.section import Cell


def headline(report: Report) -> Mapping[str, Any]:
    """Return what `headline.html.j2` reads."""
    dense, candidate = report.dense, report.candidate
    return {
        "outcome": "fail" if not report.verdict.passed else "pass" if report.verdict.rules else "",
        "word": "Pass" if report.verdict.passed else "Fail",
        "sentence": verdict_sentence(report),
        "controls": [*filter(None, [target_sentence(report)]), *control_sentences(report)],
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
        "accuracy": _recovered(report),
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


CONTROLS = {
    "pruned-first": "the control that was cut first",
    "dense-trained": "the control that was trained and not cut",
}
"""The controls in a sentence."""


def control_sentences(report: Report) -> list[str]:
    """Say for every control that was asked for whether the candidate beat it in perplexity and accuracy, and by how much.

    Returns:
        A sentence for each control, in the order of CONTROLS. Ratios are candidate / control; below 1 is better. A ratio
        that is 1 when rounded to three decimals is a tie and beats nothing.
    """
    asked = report.recipe.get("evaluate", {}).get("controls", [])
    return [_against(report, name, who) for name, who in CONTROLS.items() if name in {*asked, *report.controls}]


def _against(report: Report, name: str, who: str) -> str:
    control = report.controls.get(name)
    if control is None:
        return f"{who[0].upper()}{who[1:]} was asked for, but not measured."
    found = {text: ratio(value, control.perplexity.get(text)) for text, value in report.candidate.perplexity.items()}
    if not any(found.values()):
        return f"Against {who}, no perplexity can be compared.{_accuracy_against(report, control)}"
    told = [f"{times(value)} on {text} ({_outcome(value)})" for text, value in found.items()]
    wins = sum(_outcome(value) == "better" for value in found.values())
    ratios = " and ".join(filter(None, (", ".join(told[:-1]), told[-1])))
    return f"Against {who}, the candidate's perplexity is {ratios}: it beat the control {_on(wins, len(found))}.{_accuracy_against(report, control)}"


def _accuracy_against(report: Report, control: Measured) -> str:
    """Return a sentence on the mean accuracy, or nothing if there is none to compare."""
    judged = report.judged_tasks()
    one, other = (mean_accuracy(model.tasks, judged) for model in (report.candidate, control))
    if one is None or other is None:
        return ""
    apart = difference(one, other)
    points = round(100 * apart.value, 1)
    told = f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'}" if points else "equal"
    error = "" if apart.error is None else f", with a standard error of at most {100 * apart.error:.1f} points"
    tasks = judged[0] if len(judged) == 1 else f"{len(judged)} tasks"
    return f" Its accuracy on {tasks} is {percent(one.value)} against {percent(other.value)}: {told}{error}."


def _outcome(value: float | None) -> str:
    """Judge the ratio as it is printed, so that the words agree with the number."""
    if value is None:
        return "not measured"
    rounded = round(value, 3)
    return "equal" if rounded == 1 else "better" if rounded < 1 else "worse"


def _on(wins: int, texts: int) -> str:
    """Return "on both texts", "on none of 3 texts".

    >>> _on(1, 1), _on(0, 1), _on(2, 2), _on(1, 3), _on(0, 2)
    ('on this text', 'on no text', 'on both texts', 'on 1 of 3 texts', 'on none of 2 texts')
    """
    if texts == 1:
        return "on this text" if wins else "on no text"
    if wins == texts:
        return "on both texts" if texts == 2 else f"on all {texts} texts"
    return f"on {wins or 'none'} of {texts} texts"


def _recovered(report: Report) -> Cell | None:
    """Return the part of the dense model's accuracy that the candidate keeps; None if no task was measured."""
    judged = report.judged_tasks()
    found, dense = (mean_accuracy(model.tasks, judged) for model in (report.candidate, report.dense))
    if dense is None:
        return None
    tasks = judged[0] if len(judged) == 1 else f"mean of {len(judged)} tasks"
    value = found.value if found else None
    return Cell(times(ratio(value, dense.value)), f"{tasks}: {percent(value)} against {percent(dense.value)}")


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
