"""The report as one self-contained page: no request, no script; for a screen, a phone, paper and Kubeflow's frame."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from components.lib.report_parts import Lines
from components.lib.transformer.removal import in_words
from components.register import figures
from components.register.format import seconds, times
from components.register.headline import headline
from components.register.report import Curves, Report
from components.register.sections import SECTIONS
from components.register.sections.section import ReportSection
from components.register.words import ABOUT


def render(report: Report, curves: Curves) -> str:
    """Return the page. The same report and curves give the same page."""
    sections = [section for make in SECTIONS if (section := make(report, curves)) is not None]
    page = templates().get_template("page.html.j2")
    return page.render(
        report=report,
        title=_title(report),
        removed=in_words(report.removals()),
        headline=headline(report),
        sections=[(section.title, _body(section)) for section in sections],
    )


def _title(report: Report) -> str:
    registered = report.registered
    return f"{registered.name} version {registered.version}" if registered else "Not registered"


def _body(section: ReportSection) -> Markup:
    return Markup(templates().get_template(section.template).render(**section.data).strip())


@cache
def templates(*folders: Path) -> Environment:
    """Return the report's templates, and those in `folders`, which may extend or include them."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here / "sections", *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(times=times, seconds=seconds, drawn=_drawn)
    environment.globals["about"] = ABOUT
    return environment


def _drawn(part: Lines) -> Markup:
    return Markup(figures.lines(part))
