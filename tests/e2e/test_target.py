"""A target as a person asks for it: the depth is found and confirmed, or it is said that there is none and nothing is registered."""

from __future__ import annotations

import pytest

from components.lib.transformer.checkpoint import Checkpoint
from tests.e2e.conftest import Bench

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUICK = (
    "methods={sleb: {}}",
    "regularize.schedule=none",
    "regularize.transfer=ridge",
    "evaluate.controls=[]",
    "evaluate.speed.enabled=false",
)


def test_a_size_is_searched_confirmed_and_registered(bench: Bench) -> None:
    whole = Checkpoint.open(bench.release).bytes
    outcome = bench.run("small", *QUICK, f"target.max_bytes={int(0.75 * whole)}")
    assert outcome.status == 0, outcome.told
    report = outcome.report
    least = next(point for point in report["search"]["points"] if point["holds"])
    assert report["candidate"]["bytes"] == least["value"] <= 0.75 * whole
    assert report["verdict"]["rules"][0]["name"] == "target.max_bytes"
    assert report["registered"]["aliases"] == ["challenger"]
    assert "The target max_bytes" in " ".join(outcome.printed.split())
    assert "The search for the depth" in (outcome.folder / "report.html").read_text()


def test_a_quality_that_no_depth_has_is_refused_and_nothing_is_registered(bench: Bench) -> None:
    outcome = bench.run("none", *QUICK, "target.max_perplexity_ratio=0.1")
    assert outcome.status == 1
    assert "target.max_perplexity_ratio 0.1 does not hold at the least depth, methods.sleb.ratio 0.125" in outcome.told
    assert not list(bench.home.glob("runs/none-*/report.json"))
