"""Versions and promotions on the terminal: who became champion, when, why, and on which evidence."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from rich.console import Console

from components.lib.errors import Refusal
from components.lib.tracking.registry import Version
from components.lib.tracking.trail import Promotion
from pipeline.cli import models

TAGS = {
    "espalier.verdict": "fail",
    "espalier.failed": "quality[news]",
    "espalier.release": "owner/model",
    "espalier.revision": "7e27bd9f",
    "espalier.removed": "layers 4, 7",
    "espalier.ratio": "trsp 0.25",
    "perplexity.news": "30.1 (dense 20.2)",
    "perplexity.wikitext2": "12.5 (dense 10)",
    "espalier.run": "m-1",
    "espalier.version": "espalier 0.1.0",
    "espalier.commit": "34c2b30",
    "espalier.promoted_at": "2026-11-25 05:25:34 UTC",
    "espalier.promoted_by": "ada",
}


def printed(version: Version) -> list[str]:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(models._versions([version]))
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip()]


def test_a_version_is_told_with_its_aliases_verdict_and_evidence() -> None:
    assert printed(Version("m", "3", "s3://b/model", ("champion", "previous"), TAGS))[1:] == [
        "3 champion, previous fail, broken: quality[news]",
        "release owner/model at 7e27bd9f",
        "removed layers 4, 7 (trsp 0.25)",
        "perplexity news 30.1 (dense 20.2), wikitext2 12.5 (dense 10)",
        "run m-1",
        "code espalier 0.1.0 at 34c2b30",
        "promoted 2026-11-25 05:25:34 UTC by ada",
    ]


def test_a_version_that_others_registered_is_told_as_far_as_it_is_known() -> None:
    assert printed(Version("m", "1", "s3://b/model", (), {}))[1:] == ["1 missing"]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, "2026-11-25 05:25:34 UTC  promote 1 → 2 by ada: it is faster (pass, unsigned)"),
        ({"source": "", "why": ""}, "2026-11-25 05:25:34 UTC  promote none → 2 by ada (pass, unsigned)"),
        (
            {"state": "given up"},
            "2026-11-25 05:25:34 UTC  promote 1 → 2 by ada: it is faster (pass, unsigned, given up)",
        ),
    ],
)
def test_a_promotion_is_a_line(changed: dict[str, str], line: str) -> None:
    promotion = Promotion(
        action="promote",
        by="ada",
        at=datetime(2026, 11, 25, 5, 25, 34, tzinfo=UTC),
        source="1",
        target="2",
        previous="",
        why="it is faster",
        verdict="pass",
        signature="unsigned",
        state="done",
    )
    assert models._promotion(promotion.model_copy(update=changed)) == line


def test_without_a_terminal_the_answer_must_be_given() -> None:
    models._ask("Make it champion?", yes=True)
    with pytest.raises(Refusal, match=r"Make it champion\? There is no terminal to ask on: pass --yes"):
        models._ask("Make it champion?", yes=False)
