"""Numbers are written as a person reads them; a number that is missing is a dash."""

from __future__ import annotations

import doctest

from components.register import format
from components.register.format import count, number, seconds, times, whole


def test_the_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(format)
    assert (found.attempted, found.failed) == (7, 0)


def test_numbers_are_written_as_a_person_reads_them() -> None:
    assert [number(value) for value in (7.0801, 59.384, 227.3, 12345.6, 0.0, None)] == (
        ["7.080", "59.38", "227.3", "12,346", "0", "–"]
    )
    assert [count(value) for value in (999, 10_815_744, 6.74e9)] == ["999", "10.82 M", "6.740 G"]
    assert [whole(11008), whole(0), whole(None)] == ["11,008", "0", "–"]
    assert [times(0.98842), times(1.3, 2), times(None)] == ["0.988×", "1.30×", "–"]
    assert [seconds(8.21), seconds(59.96), seconds(185), seconds(8040)] == [
        "8.2 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 14 min",
    ]
