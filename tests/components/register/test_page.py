"""The page is whole in itself, says what decided, and shows each number beside the one it is compared with."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from components.lib.report_parts import Sentence, Table
from components.lib.transformer.selection import Channels, Selection
from components.register import page as pages
from components.register.page import render
from components.register.report import Curves, Report
from components.register.sections import SECTIONS
from components.register.sections.section import ReportSection
from tests.components.register.conftest import (
    CONTROL,
    RECIPE,
    RELEASE,
    WIDTHS,
    build_both,
    build_channels,
    build_report,
    curves_of,
    measurements,
    with_methods,
    write_run,
)

Rewrite = Callable[[dict[str, Any]], Report]
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}
LOADS = {"src", "href", "xlink:href", "data", "poster", "srcset", "action", "background"}


class Page(HTMLParser):
    """Collects the page's text, tags and what it would load; refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.classes: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "tags left open"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in LOADS]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.classes += [value or "" for name, value in attrs if name == "class"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def page_of(report: Report, curves: Curves | None = None) -> Page:
    return Page(render(report, curves or Curves()))


def test_the_page_loads_nothing_runs_nothing_and_is_the_same_each_time(report: Report, run: Path) -> None:
    html = render(report, curves_of(run))
    page = Page(html)
    assert all(load.startswith("#") for load in page.loads)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|url\((?!#)|@import", html)
    assert page.tags.count("svg") == 2 + 1 + 4 + 2  # Pareto a text, gates, four training curves, two of the recovery
    assert render(report, curves_of(run)) == html


def test_the_headline_says_the_verdict_and_the_numbers_that_matter(report: Report) -> None:
    text = page_of(report).text
    assert "reference-llama-25 version 3" in text
    assert "Pass all 10 rules hold" in text
    assert "0.799× 8.599 M parameters against 10.77 M" in text
    assert "0.988× wikitext2: 58.72 against 59.41" in text
    assert "1.140× technical: 259.1 against 227.3" in text
    assert "make the candidate's prefill 1.25× as fast" in text
    assert re.search(r"1\.\d\d× to 1\.\d\d× prefill, batch 1, 8, 64", text)


def test_a_broken_rule_is_named_in_the_headline_with_what_it_compared(run: Path) -> None:
    text = page_of(build_report(run, RECIPE.replace("pruned-first, bound: 1.0", "pruned-first, bound: 0.97"))).text
    assert "Fail 1 of 10 rules broken: control[wikitext2]" in text
    assert "58.72 against 60.24 (pruned-first) to train before the cut must pay 0.975× ≤ 0.97× fails" in text


def test_without_rules_the_page_says_that_none_were_asked_for(run: Path) -> None:
    text = page_of(build_report(run, RECIPE.partition("promote:")[0])).text
    assert "Pass no rules were asked for" in text
    assert "every candidate passes" in text


def test_what_was_changed_of_the_release_when_it_was_pinned_stands_with_its_source(report: Report) -> None:
    release = report.release.model_copy(update={"changed": ("dequantised from FP8 to bf16", "the text model alone")})
    text = page_of(report.model_copy(update={"release": release})).text
    assert "Pinned dequantised from FP8 to bf16; the text model alone Digest" in text
    assert "Pinned" not in page_of(report).text


def test_the_layers_that_went_are_marked_with_their_place(report: Report) -> None:
    html = render(report, Curves())
    assert html.count('class="gone"') == 3
    assert "in the order of removal: 9, 7, 4" in html
    assert re.search(r'<li class="gone"[^>]*><b>9</b>.*cut 1', html)


class TestChannels:
    """What a run that cut channels shows, with layers and without."""

    def test_channels_alone_are_told_axis_by_axis_and_no_layer_is_drawn(self, tmp_path: Path) -> None:
        page = page_of(
            build_channels(tmp_path), curves_of(tmp_path, with_methods(dress="{ratio: 0.25, axes: [hidden, ffn]}"))
        )
        assert "dress removed 64 of 256 hidden channels and 172 of 684 ffn channels a layer." in page.text
        assert re.search(r"hidden channels of the residual stream[^0-9]+256 192 25 % 64 25 % ffn", page.text)
        assert re.search(r"ffn intermediate [^0-9]+684 512 25\.1 % 172 25 % rounded: a multiple of 8 stays", page.text)
        assert "smallest weights × activations on the calibration windows" in page.text
        assert "strip" not in page.classes
        assert "in the order of removal" not in page.text
        assert page.tags.count("svg") == 2 + 4 + 1 + 2  # Pareto a text, four training curves, the slices, the recovery

    def test_layers_and_channels_are_both_there(self, tmp_path: Path) -> None:
        page = page_of(
            build_both(tmp_path), curves_of(tmp_path, with_methods(trsp="{ratio: 0.25}", dress="{ratio: 0.25}"))
        )
        assert "trsp and dress removed 3 of 12 layers and 172 of 684 ffn channels a layer." in page.text
        assert "layers whole transformer layers 12 9 25 % 3 25 % ffn" in page.text
        assert "in the order of removal: 9, 7, 4" in page.text
        assert page.classes.count("gone") == 3

    def test_layers_alone_have_no_table_of_axes(self, report: Report, run: Path) -> None:
        page = page_of(report, curves_of(run))
        assert "trsp removed 3 of 12 layers." in page.text
        assert "Axis Before After" not in page.text
        assert "slices" not in page.text

    def test_every_models_width_stands_beside_its_quality(self, tmp_path: Path) -> None:
        text = page_of(build_channels(tmp_path)).text
        assert "Model layers hidden channels ffn channels parameters size" in text  # layers: the champion lost some
        assert "this report is about 12 of 12 192 of 256 512 of 684 6.886 M" in text

    def test_an_axis_that_went_along_says_with_which(self, tmp_path: Path) -> None:
        """As in OPT, where only `hidden` was asked for."""
        widths = replace(WIDTHS, hidden=192, heads=6, groups=3)
        channels = Channels(hidden=tuple(range(64)), heads=((3,),) * 12)
        selection = Selection(method="dress", channels=channels)
        run = write_run(tmp_path, measurements(12, widths), selection)
        recipe = with_methods(dress="{axes: [hidden], ratio: 0.3}")
        text = page_of(build_report(run, recipe)).text
        assert "256 192 25 % 64 30 % rounded: a multiple of 8 stays" in text
        assert "4 3 25 % 1 – shrinks with hidden in this family" in text
        assert "64 of 256 hidden channels and 1 of 4 key-value groups a layer" in text

    def test_thousands_of_channels_are_counted_and_not_listed(self, tmp_path: Path) -> None:
        report = build_channels(tmp_path)
        wide = Channels(ffn=(tuple(range(0, 11008, 4)),) * 32)
        listed = report.model_copy(update={"selection": Selection(method="dress", channels=wide)})
        assert len(render(listed, Curves())) < 60_000
        assert len(listed.to_json()) > 500_000


def test_a_section_is_one_function_in_the_list(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """It brings its title, its template and its data; one that has nothing to show is left out."""
    table = Table(["layer", "zeros"], [["0", "12"], ["1", "<b>"]], title="By layer", note="Counted after the cut.")
    data = {"parts": [Sentence("Few weights are 0."), table], "groups": {}}
    added = (lambda report, curves: ReportSection("Zeros", "training.html.j2", data), lambda report, curves: None)
    monkeypatch.setattr(pages, "SECTIONS", (*SECTIONS, *added))
    page = page_of(report)
    assert page.text.endswith("Zeros Few weights are 0. By layer layer zeros 0 12 1 <b> Counted after the cut.")
    assert page.tags.count("h2") == len([make for make in SECTIONS if make(report, Curves())]) + 1


def test_the_bare_minimum_is_a_page_too(tmp_path: Path) -> None:
    models = {name: model for name, model in measurements().items() if name in ("dense", "candidate")}
    for model in models.values():
        model["speed"] = {"prefill": {}, "decode": {}}
    run = write_run(tmp_path, models)
    page = page_of(build_report(run, registered=None, timing={}, environment={}))
    assert "Not registered" in page.text
    assert "Speed was not measured." in page.text
    assert "champion the model in service now" not in page.text
    assert "Training Before the cut" not in page.text


def test_a_speed_up_has_the_range_of_its_turns(rewrite: Rewrite, models: dict[str, Any]) -> None:
    for name, turns in (("dense", [100.0, 50.0]), ("candidate", [130.0, 60.0])):
        models[name]["speed"]["prefill"]["8"]["turns"] = turns
    assert "(1.20 to 1.30)" in page_of(rewrite(models)).text


def test_a_missing_number_is_a_dash_never_a_zero(rewrite: Rewrite, models: dict[str, Any]) -> None:
    models["candidate"]["perplexity"]["technical"] = None
    text = page_of(rewrite(models)).text
    assert "– technical: – against 227.3" in text
    assert "not measured: perplexity on technical of candidate" in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = """<script>alert('x')</script>"><img src=http://evil/>"""
    models = copy.deepcopy(measurements())
    for model in models.values():
        model["perplexity"][hostile] = 10.0
        model["tasks"][hostile] = {"acc": 0.5}
    report = build_report(
        write_run(tmp_path, models),
        release={**RELEASE, "source": hostile, "revision": hostile},
        registered={"name": hostile, "version": "1", "source": hostile},
        timing={hostile: 1.0},
        environment={hostile: {hostile: hostile}},
    )
    page = page_of(report, Curves(regularize={hostile: [(1, 1.0), (2, 2.0)]}))
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("<script>alert('x')</script>") > 8
    assert all(load.startswith("#") for load in page.loads)


def test_a_text_may_be_called_like_a_column(rewrite: Rewrite, models: dict[str, Any]) -> None:
    for model in models.values():
        model["perplexity"]["size"] = 33.0
    text = page_of(rewrite(models)).text
    assert "size wikitext2 perplexity technical perplexity size perplexity" in text


class TestNotes:
    """What the reader is told before believing the numbers, only where it applies."""

    def test_the_dense_control_tells_adaptation_and_forgetting(self, report: Report) -> None:
        text = page_of(report).text
        assert "0.957× on wikitext2, 1.018× on technical" in text
        assert "add dense-trained" not in text
        assert "add pruned-first" not in text

    def test_missing_controls_are_told_with_the_text_they_matter_for(self, run: Path, models: dict[str, Any]) -> None:
        del models["dense-trained"], models["pruned-first"]
        text = page_of(build_report(write_run(run, models))).text
        assert "a low perplexity on such text (here on wikitext2) proves little on its own" in text
        assert "add pruned-first to evaluate.controls" in text

    def test_without_training_nothing_is_said_of_it(self, run: Path, models: dict[str, Any]) -> None:
        del models["dense-trained"], models["pruned-first"]
        recipe = RECIPE.replace("steps: 100", "schedule: none").replace(
            "  controls: [pruned-first, dense-trained]\n", ""
        )
        recipe = recipe.replace(CONTROL, "")
        text = page_of(build_report(write_run(run, models), recipe)).text
        assert "adapts" not in text
        assert "add pruned-first" not in text

    def test_what_the_evaluation_said_of_a_model_is_told(self, rewrite: Rewrite, models: dict[str, Any]) -> None:
        models["champion"]["notes"] = ["perplexity on technical is nan"]
        assert "champion: perplexity on technical is nan." in page_of(rewrite(models)).text

    def test_one_text_is_too_few(self, rewrite: Rewrite, models: dict[str, Any]) -> None:
        for model in models.values():
            del model["perplexity"]["technical"]
        assert "Only one text was measured" in page_of(rewrite(models)).text


class TestTasks:
    @pytest.fixture
    def text(self, rewrite: Rewrite, models: dict[str, Any]) -> str:
        scores = {"dense": (0.70, 0.5), "candidate": (0.63, 0.4)}
        for name, (piqa, other) in scores.items():
            models[name]["tasks"] = {
                "piqa": {"acc": 0.6, "acc_stderr": 0.03, "acc_norm": piqa, "acc_norm_stderr": 0.02},
                "other": {"acc": other, "acc_stderr": 0.02},
                "counted": {"exact_match": 0.25},
            }
        return page_of(rewrite(models)).text

    def test_the_mean_of_the_headline_metrics_is_among_the_qualities(self, text: str) -> None:
        assert "accuracy mean of 2 tasks" in text
        assert "51.5% -8.5 points" in text

    def test_each_metric_has_its_error_and_what_was_recovered(self, text: str) -> None:
        assert "mean of 2 tasks of the first metric of each 60.0% ± 1.4 51.5% ± 1.4 0.858×" in text
        assert "piqa normalised accuracy 70.0% ± 2.0 63.0% ± 2.0 0.900×" in text
        assert "piqa accuracy 60.0% ± 3.0 60.0% ± 3.0 1.000×" in text
        assert "other accuracy 50.0% ± 2.0 40.0% ± 2.0 0.800×" in text
        assert "counted exact match 0.2500 1.000× 0.2500 1.000×" in text

    def test_the_headline_has_the_recovered_mean(self, text: str) -> None:
        assert "0.858× mean of 2 tasks: 51.5% against 60.0%" in text

    def test_there_is_no_section_without_tasks(self, report: Report) -> None:
        assert "Task" not in page_of(report).text


def test_prompts_are_shown_with_the_continuation_of_every_model(rewrite: Rewrite, models: dict[str, Any]) -> None:
    for name in ("dense", "candidate"):
        models[name]["continued"] = {"Name a tree.": f"<i>{name}</i>"}
    text = page_of(rewrite(models)).text
    assert "Name a tree. dense <i>dense</i> candidate <i>candidate</i> champion –" in text
