"""The prompts of the recipe, continued by every model."""

from __future__ import annotations

from components.register.measured import names
from components.register.report import Curves, Report
from components.register.sections.section import ReportSection


def prompts(report: Report, curves: Curves) -> ReportSection | None:
    """Show the continuations side by side; None if the recipe has no prompts."""
    models = report.models()
    asked = names(model.continued for model in models.values())
    if not asked:
        return None
    data = {
        "prompts": {
            prompt: {name: model.continued.get(prompt, "–") for name, model in models.items()} for prompt in asked
        }
    }
    return ReportSection("Prompts", "prompts.html.j2", data)
