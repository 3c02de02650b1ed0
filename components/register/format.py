"""Numbers as a person reads them."""

from __future__ import annotations

import math

ABSENT = "–"
"""A number that was not measured; never 0."""


def number(value: float | None, digits: int = 4) -> str:
    """Format with `digits` significant digits and a separator between thousands.

    >>> number(7.0801), number(1234.5), number(0.058, 3), number(None)
    ('7.080', '1,234', '0.0580', '–')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(0, decimals), 6)}f}"


def count(value: float) -> str:
    """Format a count or a size with its decimal prefix.

    >>> count(10_815_744), count(999), count(6.74e9)
    ('10.82 M', '999', '6.740 G')
    """
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{number(value / size)} {prefix}"
    return f"{value:g}"


def number_or_count(value: float | None) -> str:
    """Format a number, from a million on with its decimal prefix.

    >>> number_or_count(58.72), number_or_count(8_599_000)
    ('58.72', '8.599 M')
    """
    return count(value) if value is not None and value >= 1e6 else number(value)


def whole(value: int | None) -> str:
    """Format a whole number with a separator between thousands.

    >>> whole(11008), whole(None)
    ('11,008', '–')
    """
    return ABSENT if value is None else f"{value:,}"


def times(value: float | None, digits: int = 3) -> str:
    """Format a ratio with `digits` decimals.

    >>> times(0.98842), times(None)
    ('0.988×', '–')
    """
    return ABSENT if value is None else f"{value:.{digits}f}×"


def percent(value: float | None) -> str:
    """Format a part of a whole in per cent.

    >>> percent(0.4831), percent(None)
    ('48.3%', '–')
    """
    return ABSENT if value is None else f"{value:.1%}"


def seconds(value: float) -> str:
    """Format a duration.

    >>> seconds(8.21), seconds(185), seconds(8040)
    ('8.2 s', '3 min 05 s', '2 h 14 min')
    """
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
