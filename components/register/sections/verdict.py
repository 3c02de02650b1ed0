"""Every rule of the recipe's `promote` section, with the reason for it, what was found and what was asked."""

from __future__ import annotations

from components.register.format import number_or_count
from components.register.report import Curves, Report
from components.register.sections.section import ReportSection
from components.register.verdict import Outcome


def verdict(report: Report, curves: Curves) -> ReportSection:
    """List the rules, each with the two numbers it compares."""
    rules = [(rule, rule.note or _compared(rule)) for rule in report.verdict.rules]
    return ReportSection(
        "Verdict, rule by rule", "verdict.html.j2", {"rules": rules, "signature": report.verdict.signature}
    )


def _compared(rule: Outcome) -> str:
    """Return the two numbers of a rule: "58.72 against 59.41 (dense)"."""
    (_, value), (opponent, base) = rule.compared.items()
    return f"{number_or_count(value)} against {number_or_count(base)} ({opponent})"
