"""The curves of the training before the cut and of the recovery after it."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from components.lib.recipe.schema import Recipe
from components.lib.report_parts import Line, Lines, Mark, Part
from components.lib.training.schedule import annealed_part
from components.register import figures
from components.register.report import Curve, Curves, Report
from components.register.sections.section import ReportSection
from components.register.words import BACKSTAGE, METRICS

SLICES = {
    "slices_attention": "attention",
    "slices_ffn": "feed-forward",
    "slices_rest": "embeddings, head and norms",
}
"""Names of the metrics of the slices, and of the parts of the model that they measure."""


def training(report: Report, curves: Curves) -> ReportSection | None:
    """Show a panel for each metric; None if nothing was trained."""
    mark = _full_strength(report)
    parts = slices(report.parsed_recipe(), curves.regularize, mark)
    groups = {
        "Before the cut": _panels(curves.regularize, mark),
        "Recovery after the cut": _panels(curves.recover, None),
    }
    shown = {heading: panels for heading, panels in groups.items() if panels}
    return ReportSection("Training", "training.html.j2", {"parts": parts, "groups": shown}) if parts or shown else None


def _panels(curves: Mapping[str, Curve], mark: Mark | None) -> list[Markup]:
    """Draw a panel for each metric, the loss first; leave out metrics that never change."""
    hidden = {*BACKSTAGE, *SLICES}
    shown = [name for name in curves if name not in hidden and len({value for _, value in curves[name]}) > 1]
    shown.sort(key=lambda name: name != "loss")
    return [Markup(figures.curve(curves[name], METRICS.get(name, name), mark=mark)) for name in shown]


def _full_strength(report: Report) -> Mark | None:
    """Mark the step from which the regularisation is at its full strength; the recorded steps begin at 1."""
    regularize = report.parsed_recipe().regularize
    part = annealed_part(regularize, layers=bool(report.selection.removed))
    if regularize.schedule == "anneal" and part:
        return Mark(round(part * regularize.steps) + 1, "gates at 0")
    if regularize.schedule == "penalty" and regularize.ramp:
        return Mark(round(regularize.ramp * regularize.steps) + 1, "full penalty")
    return None


def slices(recipe: Recipe, curves: Mapping[str, Curve], mark: Mark | None) -> list[Part]:
    """Return the picture of the slices of the weights that the cut removes; none if no channels are removed.

    Args:
        recipe: its `regularize` says which norm was measured.
        curves: (step, value) by the metric's name, of the training before the cut.
        mark: the step from which the regularisation is at its full strength.
    """
    lines = [Line(part, curves[name]) for name, part in SLICES.items() if name in curves]
    if not lines:
        return []
    norm = "squared ℓ2 norm" if recipe.regularize.norm == "l2" else "ℓ1 norm"
    title = f"{norm} of the slices, of its start"
    return [
        Lines(
            x="optimizer step",
            y=title,
            lines=lines,
            summary=f"{title}: {', '.join(line.name for line in lines)}",
            title="What the cut takes away",
            caption=(
                "The slices of the weights that the cut removes, relative to their norm before the training, as the model "
                "sees them: multiplied by their gates. The part that is not at 0 at the end is lost in the cut."
            ),
            marks=[mark] if mark else [],
        )
    ]
