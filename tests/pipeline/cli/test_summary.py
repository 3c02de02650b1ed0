"""The terminal shows every model beside the dense one, and names the rules that are broken."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from components.register.report import Report
from pipeline.cli.summary import print_summary
from tests.components.register.conftest import RECIPE, build_channels, build_report, measurements, write_run


def printed(report: Report | dict[str, Any], width: int = 140) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    print_summary(report, console)
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_models_stand_side_by_side_with_their_ratio_to_dense(tmp_path: Path) -> None:
    report = build_report(write_run(tmp_path))
    lines = printed(report)
    assert lines[0] == "dense candidate pruned-first dense-trained champion"
    assert "perplexity technical 227.3 259.1 1.140× 269.0 1.183× 231.4 1.018× 251.8 1.108×" in lines
    assert "Pass: all 10 rules hold" in lines
    assert printed(json.loads(report.to_json())) == lines


def test_channels_are_shown_where_any_model_has_fewer(tmp_path: Path) -> None:
    lines = printed(build_channels(tmp_path))
    assert "layers 12 12 12 12 10" in lines
    assert "hidden channels 256 192 192 256 256" in lines
    assert "ffn channels a layer 684 512 512 684 684" in lines
    assert not any(line.startswith("key-value") for line in lines)


def test_the_last_lines_say_whether_the_candidate_beat_each_control(tmp_path: Path) -> None:
    lines = printed(build_report(write_run(tmp_path)), width=60)
    text = " ".join(lines[-8:])
    assert (
        "Against the control that was cut first, the candidate's perplexity is 0.975× on wikitext2 (better) and" in text
    )
    assert "0.963× on technical (better): it beat the control on both texts." in text
    assert text.endswith("1.120× on technical (worse): it beat the control on none of 2 texts.")


def test_tasks_stand_below_the_texts_with_their_mean(tmp_path: Path) -> None:
    models = measurements()
    for name, value in {"dense": 0.6, "candidate": 0.45}.items():
        models[name]["tasks"] = {"piqa": {"acc": 0.1, "acc_norm": value}, "arc": {"acc": 0.4}}
    lines = printed(build_report(write_run(tmp_path, models)))
    assert "accuracy piqa 60.0% 45.0% 0.750× – – –" in lines
    assert "accuracy, mean of 2 tasks 50.0% 42.5% 0.850× – – –" in lines


def test_broken_rules_are_named_with_what_was_found_and_asked(tmp_path: Path) -> None:
    models = measurements()
    models["candidate"]["perplexity"]["technical"] = None
    recipe = RECIPE.replace("bound: 1.15", "bound: 0.9")
    lines = printed(build_report(write_run(tmp_path, models), recipe))
    assert "perplexity technical 227.3 – 269.0 1.183× 231.4 1.018× 251.8 1.108×" in lines
    assert any(line.startswith("Fail: 4 of 10 rules broken: quality[wikitext2], ") for line in lines)
    assert "quality[wikitext2]: 0.988×, asked at most 0.9×" in lines
    assert "quality[technical]: not measured: perplexity on technical of candidate" in lines


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    models = measurements()
    for model in models.values():
        model["perplexity"]["[red]x[/]"] = 5.0
    assert any(
        line.startswith("perplexity [red]x[/] 5.000") for line in printed(build_report(write_run(tmp_path, models)))
    )


def test_prompts_stand_with_both_continuations(tmp_path: Path) -> None:
    models = measurements()
    models["dense"]["continued"] = {"What is [b]?": "A letter.\nYes."}
    models["candidate"]["continued"] = {"What is [b]?": "A lette"}
    lines = printed(build_report(write_run(tmp_path, models)))
    place = lines.index("What is [b]?")
    assert lines[place + 1 : place + 3] == ["dense: A letter. Yes.", "candidate: A lette"]
