"""Where the candidate comes from, what it was made with, how long it took, and the whole recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from components.register.format import ABSENT
from components.register.report import Curves, Report
from components.register.sections.section import ReportSection


def lineage(report: Report, curves: Curves) -> ReportSection:
    """Show what is needed to make the candidate again."""
    stages = {stage: took for stage, took in report.timing.items() if stage != "total"}
    data = {
        "release": report.release,
        "registered": report.registered,
        "environment": [(name, list(flat(value))) for name, value in report.environment.items()],
        "stages": stages,
        "of_stages": sum(stages.values()),
        "of_run": report.timing.get("total"),
        "recipe": yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
    }
    return ReportSection("Lineage", "lineage.html.j2", data)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Flatten a setting into (name, value) pairs; a plain value has no name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name} {key}".strip())
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    else:
        yield name, ABSENT if value is None else str(value)
