"""What the pages tell a person to write works, and what they point to is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from components.lib.methods import Task
from components.lib.recipe.schema import Target
from components.lib.training.journal import Silent
from components.lib.transformer.selection import Channels, Selection
from components.lib.transformer.surgery import cut_checkpoint
from tests.components.lib.training.tiny import counting
from tests.components.lib.transformer import zoo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def methods() -> list[str]:
    """The methods that docs/add-a-method.md shows."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-method.md").read_text(), flags=re.DOTALL)


def chosen(code: str) -> Selection:
    """Let a method choose half of a tiny Llama of four layers."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names["choose"](
        zoo.SPECIMENS[0].model(layers=4), counting(), Task(Target(ratio=0.5)), journal=Silent(), out=None
    )


def test_the_methods_that_are_shown_choose_what_they_say(tmp_path: Path) -> None:
    layers, channels = map(chosen, methods())
    assert (layers.removed, layers.channels) == ((2, 3), Channels())
    assert channels.removed == ()
    assert channels.channels.axes == ("ffn",)
    assert channels.channels.count("ffn") == zoo.SPECIMENS[0].model().config.intermediate_size // 2
    cut_checkpoint(
        zoo.release(zoo.SPECIMENS[0].model(layers=4), tmp_path / "a"), tmp_path / "b", channels=channels.channels
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
