"""What the runners' tests start from."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe

RECIPE = """
methods: {trsp: {ratio: 0.25}}
calibration: {data: TEXT, samples: 2, length: 8}
evaluate: {perplexity: {one: TEXT}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 50)
    return parse_recipe(RECIPE.replace("TEXT", str(text)))


@pytest.fixture
def shown() -> Console:
    return Console(file=io.StringIO(), width=300)
