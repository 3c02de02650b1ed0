"""The parts of a report can be built where neither torch nor matplotlib is at hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from components.lib.report_parts import Table

LIGHT = """
import sys
import components.lib.report_parts
print(sorted({"torch", "matplotlib", "jinja2", "pydantic"} & set(sys.modules)))
"""


def test_they_import_nothing_heavy() -> None:
    loaded = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_a_row_that_does_not_fit_the_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="as many cells as its head: 2"):
        Table(["axis", "before"], [["ffn"]])
