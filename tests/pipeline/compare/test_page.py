"""The page of a comparison: inert, and every number beside the dense model's."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from pipeline.compare.comparison import Comparison
from pipeline.compare.page import render


class Text(HTMLParser):
    """Collects the tags, and the text of each table cell."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.text += "\n"

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


@pytest.fixture
def page(comparison: Comparison) -> Text:
    parser = Text()
    parser.feed(render(comparison))
    return parser


def line(page: Text, start: str) -> str:
    return next(found for one in page.text.splitlines() if (found := " ".join(one.split())).startswith(start))


def test_it_is_inert(comparison: Comparison, page: Text) -> None:
    html = render(comparison)
    assert "default-src 'none'" in html
    assert not {"script", "img", "link", "iframe", "form"} & set(page.tags)
    assert not re.search(r"https?://|<i>small|<b>other", html)
    assert "models/<i>small</i>" in page.text


def test_each_row_has_the_median_its_ratio_to_dense_and_the_range(page: Text) -> None:
    assert line(page, "dense the release, nothing removed 6") == (
        "dense the release, nothing removed 6 of 8 1.000 k 2.000 kB 10.00 100.5 100.0 to 101.0"
    )
    assert "22.00 2.200× 2.000× to 2.400×" in line(page, "trsp 0.5")
    assert "control: the same cut made first" in page.text
    assert line(page, "sleb 0.5 0 of 2") == "sleb 0.5 0 of 2 – – – –"


def test_a_failed_cell_is_named_with_its_sentence(page: Text) -> None:
    assert "sleb at 0.5, seed 0 : prune: <b>other</b> logits" in " ".join(page.text.split())


def test_a_picture_for_each_text_shows_size_and_speed(page: Text, comparison: Comparison) -> None:
    assert page.tags.count("svg") == 2
    assert render(comparison) == render(comparison)
    for label in ("size, of dense", "decode speed, batch 8, of dense"):
        assert label in page.text


def test_the_command_makes_it_again(page: Text, comparison: Comparison) -> None:
    assert comparison.command in page.text


def test_a_comparison_without_a_measured_cell_says_so(comparison: Comparison) -> None:
    failed = tuple(cell.model_copy(update={"state": "failed", "models": {}}) for cell in comparison.cells)
    assert "0 of 8 cells are measured, 8 failed" in " ".join(
        render(comparison.model_copy(update={"cells": failed})).split()
    )
