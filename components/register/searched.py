"""The search of a recipe with a target, in the report: its curve, and what it means for the registration."""

from __future__ import annotations

from collections.abc import Sequence

from components.lib.depth import Search, in_words
from components.lib.report_parts import Line, Lines, Mark, Part
from components.register.format import number_or_count
from components.register.report import Report

MEASURED = {
    "max_perplexity_ratio": "perplexity on held-out windows, of dense",
    "min_accuracy_recovery": "accuracy of the next token on held-out windows, of dense",
    "min_speedup": "prefill throughput, of dense",
    "max_bytes": "bytes of the weights",
}


def parts(search: Search | None) -> Sequence[Part]:
    """Return the curve of the search; nothing if nothing was searched."""
    if search is None:
        return []
    measured = MEASURED[search.field]
    points = [(point.part, point.value) for point in search.points]
    last = points[-1][0]
    lines = [
        Line("measured", points),
        Line(f"target {search.bound:g}", [(points[0][0], search.bound), (last, search.bound)]),
    ]
    return [
        Lines(
            x="depth, of the recipe's ratios",
            y=measured,
            lines=lines,
            summary=f"{measured} at {len(points)} depths",
            title="The search for the depth",
            caption=(
                f"Measured after the transfer and without training. {in_words(search.chosen.ratios)} was chosen "
                f"({number_or_count(search.chosen.value)})."
            ),
            marks=[Mark(search.part, "chosen")],
        )
    ]


def target_sentence(report: Report) -> str:
    """Say whether the target holds after the whole recipe, and which ratio to ask for if not; empty without a target."""
    search = report.search
    if search is None:
        return ""
    target = f"The target {search.field} {search.bound:g}"
    found = in_words(search.chosen.ratios)
    if report.verdict.target_holds:
        return f"{target} holds after the whole recipe, at {found}, which the search found."
    cure = f"ask for {in_words(search.next)}" if search.next else "no other depth is left: ask for less"
    return f"{target} does not hold after the whole recipe at {found}, so that nothing is registered: {cure}."
