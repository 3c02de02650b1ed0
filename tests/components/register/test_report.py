"""`report.json` holds every field with its numbers, and is read back as it was written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.report_parts import Lines
from components.register.report import Report, read_curves
from tests.components.register.conftest import (
    RECIPE,
    RELEASE,
    TIMING,
    build_channels,
    build_report,
    curves_of,
    with_methods,
    write_lines,
)

Rewrite = Callable[[dict[str, Any]], Report]


def test_report_json_has_the_fields_that_are_promised(report: Report) -> None:
    told = json.loads(report.to_json())
    assert " ".join(told) == (
        "release recipe selection dense candidate champion controls verdict search registered timing environment"
    )
    assert told["release"] == RELEASE | {"changed": []}
    assert told["selection"]["method"] == "trsp"
    assert told["selection"]["removed"] == [4, 7, 9]
    assert told["selection"]["order"] == [9, 7, 4]
    assert set(told["controls"]) == {"pruned-first", "dense-trained"}
    for model in (told["dense"], told["candidate"], told["champion"], *told["controls"].values()):
        assert {"parameters", "bytes", "perplexity", "speed"} <= set(model)
    assert set(told["candidate"]["speed"]["decode"]["8"]) == {
        "tokens_per_second",
        "latency_ms_p50",
        "latency_ms_p90",
        "turns",
    }
    assert told["candidate"]["perplexity"] == {"wikitext2": 58.72, "technical": 259.1}
    assert {"name", "value", "bound", "passed", "why"} <= set(told["verdict"]["rules"][0])
    assert set(told["registered"]) == {"name", "version", "aliases", "source"}
    assert told["timing"] == TIMING


def test_the_selection_holds_every_channel_and_each_model_its_widths(tmp_path: Path) -> None:
    told = json.loads(build_channels(tmp_path).to_json())
    assert told["selection"]["method"] == "dress"
    assert told["selection"]["removed"] == []
    assert told["selection"]["channels"]["hidden"] == list(range(0, 256, 4))
    assert [len(layer) for layer in told["selection"]["channels"]["ffn"]] == [172] * 12
    assert told["selection"]["channels"]["heads"] == []
    assert told["dense"]["widths"] == {"hidden": 256, "ffn": 684, "heads": 8, "groups": 4, "head": 32, "experts": 0}
    assert told["candidate"]["widths"] == {"hidden": 192, "ffn": 512, "heads": 8, "groups": 4, "head": 32, "experts": 0}
    assert Report.model_validate(told) == build_channels(tmp_path)


def test_report_json_is_read_back_equal(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(report.to_json())
    assert Report.load(tmp_path / "report.json") == report


def test_a_number_that_is_not_finite_is_null_in_strict_json(rewrite: Rewrite, models: dict[str, Any]) -> None:
    models["candidate"]["perplexity"]["technical"] = math.nan
    models["dense"]["speed"]["decode"]["1"]["latency_ms_p90"] = math.inf
    report = rewrite(models)
    told = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert told["candidate"]["perplexity"]["technical"] is None
    assert not report.verdict.passed
    assert Report.model_validate(told) == report


def test_the_champion_is_null_and_controls_are_empty_where_there_are_none(
    rewrite: Rewrite, models: dict[str, Any]
) -> None:
    for name in ("champion", "pruned-first", "dense-trained"):
        del models[name]
    told = json.loads(rewrite(models).to_json())
    assert told["champion"] is None
    assert told["controls"] == {}


@pytest.mark.parametrize("method", ["trsp", "sleb", "dress"])
def test_the_recipe_is_told_with_its_defaults_and_can_be_run_again(run: Path, method: str) -> None:
    recipe = with_methods(**{method: "{ratio: 0.5}"})
    told = build_report(run, recipe).recipe
    assert told["regularize"]["learning_rate"] == parse_recipe(recipe).regularize.learning_rate
    assert Recipe.model_validate(told) == parse_recipe(recipe)
    assert [name for name, settings in told["methods"].items() if settings] == [method]
    assert told["methods"][method]["batch_size"] == 8


def test_curves_are_read_by_name_a_repeated_step_once_and_in_order(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 4.0}, {"step": 3, "loss": 3.0}, {"step": 2, "loss": 3.5, "kl": math.nan}]
    write_lines(tmp_path / "metrics.jsonl", [*lines, {"step": 3, "loss": 2.5, "kl": 1}])
    curves = read_curves(parse_recipe(RECIPE), selection=tmp_path, regularize=tmp_path)
    assert curves.regularize == {"loss": [(1, 4.0), (2, 3.5), (3, 2.5)], "kl": [(3, 1.0)]}
    assert curves.parts == []
    assert curves.recover == {}


def test_the_parts_of_the_methods_are_read_from_what_they_left(run: Path) -> None:
    (gates,) = curves_of(run).parts
    assert isinstance(gates, Lines)
    assert gates.summary == "Gates of 12 layers over 36 steps"
    words = curves_of(run, with_methods(trsp="{ratio: 0.25}", dress="{ratio: 0.25}")).parts
    assert [part.kind for part in words] == ["lines", "sentence"]
