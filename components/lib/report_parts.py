"""Parts of a report that a library can build without drawing them: sentences, tables and pictures of lines.

A method builds these parts from its own settings and files; `components/register` turns them into HTML. This module imports
neither torch nor matplotlib nor a template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

Points = Sequence[tuple[float, float]]
"""(x, y) in the order of x, finite."""


@dataclass(frozen=True)
class Sentence:
    """A paragraph of plain text."""

    text: str
    kind: ClassVar[Literal["sentence"]] = "sentence"


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Each as long as `head`."""
    title: str = ""
    """A heading above the table; none if it is empty."""
    note: str = ""
    """A sentence below the table; none if it is empty."""
    kind: ClassVar[Literal["table"]] = "table"

    def __post_init__(self) -> None:
        """Check the rows. Raises ValueError if one is shorter or longer than the head."""
        if any(len(row) != len(self.head) for row in self.rows):
            raise ValueError(f"every row of a table has as many cells as its head: {len(self.head)}")


@dataclass(frozen=True)
class Line:
    """A line of a picture."""

    name: str
    points: Points
    stands_out: bool = False
    """Draw it in the accent colour, and write its name at its end. Only of use if `Lines.names` is "ends"."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`; without words it only divides the picture."""

    x: float
    words: str = ""


@dataclass(frozen=True)
class Lines:
    """A picture of lines over a common axis."""

    x: str
    """The label of the horizontal axis."""
    y: str
    lines: Sequence[Line]
    summary: str
    """The picture in words, for readers who do not see it."""
    title: str = ""
    """A heading above the picture; none if it is empty."""
    caption: str = ""
    marks: Sequence[Mark] = ()
    names: Literal["ends", "legend"] = "legend"
    """Name the lines that stand out at their ends, or all lines in a legend."""
    kind: ClassVar[Literal["lines"]] = "lines"


Part = Sentence | Table | Lines
