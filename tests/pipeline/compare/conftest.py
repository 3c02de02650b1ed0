"""A comparison as it comes: two recipes at two ratios with two seeds, one cell failed and one still waiting."""

from __future__ import annotations

from typing import Any

import pytest

from components.register.measured import Measured
from components.register.report import Release
from pipeline.compare.comparison import Comparison, Result


def measured(parameters: int, perplexity: float, speed: float) -> Measured:
    pace = {"8": {"tokens_per_second": speed}}
    numbers: dict[str, Any] = {"parameters": parameters, "bytes": 2 * parameters, "layers": 8}
    return Measured(**numbers, perplexity={"test": perplexity}, speed={"decode": pace})


def cell(recipe: str, ratio: float, seed: int, perplexity: float, **more: Any) -> Result:
    """A measured cell; the dense model's speed differs from cell to cell, as on a machine that others use."""
    models = {
        "dense": measured(1000, 10.0, 100.0 + seed),
        "candidate": measured(round(1000 * (1 - ratio)), perplexity, (100.0 + seed) / (1 - ratio)),
    }
    if recipe == "trsp":
        models["pruned-first"] = measured(round(1000 * (1 - ratio)), perplexity + 1, 1.0)
    return Result(recipe=recipe, ratio=ratio, seed=seed, run="r", state="done", models=models, **more)


@pytest.fixture
def comparison() -> Comparison:
    cells = (
        cell("trsp", 0.25, 0, 11.0),
        cell("trsp", 0.5, 0, 20.0),
        cell("sleb", 0.25, 0, 13.0),
        Result(recipe="sleb", ratio=0.5, seed=0, run="r", state="failed", reason="prune: <b>other</b> logits"),
        cell("trsp", 0.25, 1, 12.0),
        cell("trsp", 0.5, 1, 24.0),
        cell("sleb", 0.25, 1, 13.0),
        Result(recipe="sleb", ratio=0.5, seed=1, run="r"),
    )
    return Comparison(
        release=Release(source="models/<i>small</i>", revision=None, digest="sha256:" + "a" * 64),
        command="espalier compare trsp sleb --model 'models/<i>small</i>' --ratios 0.25,0.5 --seeds 0,1",
        recipes={"trsp": "methods: {trsp: {ratio: 0.25}}", "sleb": "methods: {sleb: {ratio: 0.25}}"},
        cells=cells,
        environment={"versions": {"torch": "2.13.0"}},
    )
