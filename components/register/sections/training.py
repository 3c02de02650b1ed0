"""The curves of the training before the cut and of the recovery after it."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from components.lib.report_parts import Mark
from components.register import figures, method_parts
from components.register.report import Curve, Curves, Report
from components.register.sections.section import Section
from components.register.words import BACKSTAGE, METRICS


def training(report: Report, curves: Curves) -> Section | None:
    """Show a panel for each metric; None if nothing was trained."""
    mark = _full_strength(report)
    parts = method_parts.training(report.parsed_recipe(), curves.regularize, mark)
    groups = {
        "Before the cut": _panels(curves.regularize, mark),
        "Recovery after the cut": _panels(curves.recover, None),
    }
    shown = {heading: panels for heading, panels in groups.items() if panels}
    return Section("Training", "training.html.j2", {"parts": parts, "groups": shown}) if parts or shown else None


def _panels(curves: Mapping[str, Curve], mark: Mark | None) -> list[Markup]:
    """Draw a panel for each metric, the loss first; leave out metrics that never change."""
    hidden = {*BACKSTAGE, *method_parts.SLICES}
    shown = [name for name in curves if name not in hidden and len({value for _, value in curves[name]}) > 1]
    shown.sort(key=lambda name: name != "loss")
    return [Markup(figures.curve(curves[name], METRICS.get(name, name), mark=mark)) for name in shown]


def _full_strength(report: Report) -> Mark | None:
    """Mark the step from which the regularisation is at its full strength; the recorded steps begin at 1."""
    regularize = report.parsed_recipe().regularize
    if regularize.schedule == "anneal":
        part = regularize.annealing(layers=bool(report.selection.removed))
        return Mark(round(part * regularize.steps) + 1, "gates at 0")
    if regularize.schedule == "penalty" and regularize.ramp:
        return Mark(round(regularize.ramp * regularize.steps) + 1, "full penalty")
    return None
