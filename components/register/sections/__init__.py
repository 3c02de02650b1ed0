"""The sections of the report: a file and a template each. To add one, write the two and add a line to SECTIONS."""

from __future__ import annotations

from collections.abc import Callable

from components.register.report import Curves, Report
from components.register.sections.lineage import lineage
from components.register.sections.prompts import prompts
from components.register.sections.quality import quality
from components.register.sections.removed import removed
from components.register.sections.section import ReportSection
from components.register.sections.speed import speed
from components.register.sections.tasks import tasks
from components.register.sections.training import training
from components.register.sections.verdict import verdict

SECTIONS: tuple[Callable[[Report, Curves], ReportSection | None], ...] = (
    verdict,
    quality,
    tasks,
    prompts,
    speed,
    removed,
    training,
    lineage,
)
"""In the order of the page. A function returns None if the run has nothing to show in its section."""
