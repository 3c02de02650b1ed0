"""The headline says which rules decided, and whether the candidate beat the controls and by how much."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.register import headline
from components.register.headline import control_sentences
from components.register.page import render
from components.register.report import Curves, Report
from tests.components.register.conftest import CONTROL, RECIPE, build_report, write_run

Rewrite = Callable[[dict[str, Any]], Report]


def with_perplexities(
    models: dict[str, Any], candidate: dict[str, float | None], control: dict[str, float | None]
) -> Any:
    models["candidate"]["perplexity"], models["pruned-first"]["perplexity"] = candidate, control
    del models["dense-trained"]
    return models


def test_the_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(headline)
    assert (found.attempted, found.failed) == (1, 0)


def test_every_control_has_a_sentence_with_ratios_and_how_many_texts_were_won(report: Report) -> None:
    assert control_sentences(report) == [
        "Against the control that was cut first, the candidate's perplexity is 0.975× on wikitext2 (better) and "
        "0.963× on technical (better): it beat the control on both texts.",
        "Against the control that was trained and not cut, the candidate's perplexity is 1.033× on wikitext2 (worse) and "
        "1.120× on technical (worse): it beat the control on none of 2 texts.",
    ]


@pytest.mark.parametrize(
    ("candidate", "control", "words"),
    [
        (
            {"a": 9.57, "b": 10.12, "c": 10.0},
            {"a": 10.0, "b": 10.0, "c": 10.0},
            "0.957× on a (better), 1.012× on b (worse) and 1.000× on c (equal): it beat the control on 1 of 3 texts.",
        ),
        ({"a": 10.1}, {"a": 10.0}, "1.010× on a (worse): it beat the control on no text."),
        ({"a": 9.9}, {"a": 10.0}, "0.990× on a (better): it beat the control on this text."),
        ({"a": 9.9999}, {"a": 10.0}, "1.000× on a (equal): it beat the control on no text."),
        (
            {"a": 9.0, "b": None},
            {"a": 10.0, "b": 10.0},
            "0.900× on a (better) and – on b (not measured): it beat the control on 1 of 2 texts.",
        ),
    ],
)
def test_the_words_agree_with_the_ratios_as_printed(
    candidate: dict[str, float | None],
    control: dict[str, float | None],
    words: str,
    rewrite: Rewrite,
    models: dict[str, Any],
) -> None:
    against, missing = control_sentences(rewrite(with_perplexities(models, candidate, control)))
    assert against == f"Against the control that was cut first, the candidate's perplexity is {words}"
    assert missing == "The control that was trained and not cut was asked for, but not measured."


def test_nothing_is_claimed_where_no_number_can_be_compared(rewrite: Rewrite, models: dict[str, Any]) -> None:
    report = rewrite(with_perplexities(models, {"a": None}, {"a": 10.0}))
    assert control_sentences(report)[0] == "Against the control that was cut first, no perplexity can be compared."


def test_accuracy_is_compared_if_there_are_tasks(rewrite: Rewrite, models: dict[str, Any]) -> None:
    for name, value in {"dense": 0.6, "candidate": 0.55, "pruned-first": 0.53, "dense-trained": 0.55}.items():
        models[name]["tasks"] = {task: {"acc": value, "acc_stderr": 0.02} for task in ("a", "b")}
    first, second = control_sentences(rewrite(models))
    assert first.endswith(
        "it beat the control on both texts. Its accuracy on 2 tasks is 55.0% against 53.0%: 2.0 points higher, "
        "with a standard error of at most 2.0 points."
    )
    assert second.endswith(
        "Its accuracy on 2 tasks is 55.0% against 55.0%: equal, with a standard error of at most 2.0 points."
    )


def test_without_controls_nothing_is_said_of_them(run: Path, models: dict[str, Any]) -> None:
    del models["pruned-first"], models["dense-trained"]
    recipe = RECIPE.replace("  controls: [pruned-first, dense-trained]\n", "")
    report = build_report(write_run(run, models), recipe.replace(CONTROL, ""))
    assert control_sentences(report) == []
    assert 'class="control"' not in render(report, Curves())


def test_the_page_shows_the_sentences_in_its_headline(report: Report) -> None:
    html = render(report, Curves())
    above = html[: html.index("Verdict, rule by rule")]
    assert above.count('<p class="control">') == 2
    assert "0.975× on wikitext2 (better) and 0.963× on technical (better): it beat the control on both texts." in above
