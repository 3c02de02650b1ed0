"""A section of the report: its title, template and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class ReportSection:
    """A section of the page."""

    title: str
    template: str
    """The Jinja file in this folder that makes the section's HTML."""
    data: Mapping[str, Any]
    """Every name that the template reads."""


class Cell(NamedTuple):
    """A number in a table, and below it the comparison that belongs to it."""

    number: str
    beside: str = ""
    more: str = ""
