"""A candidate is judged rule by rule, and what was not measured cannot hold."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from components.register.measured import Measured, ratio, read_evaluation
from components.register.verdict import Verdict, judge

BASE = """
methods: {trsp: {ratio: 0.25}}
calibration: {data: calibration.txt}
evaluate:
  perplexity: {near: near.txt, far: far.txt}
  controls: [pruned-first]
  speed: {batches: [1, 8]}
promote: {RULES}
"""

MODELS: dict[str, Any] = {
    "dense": {"parameters": 1000, "bytes": 2000, "layers": 4, "perplexity": {"near": 10.0, "far": 20.0}},
    "candidate": {"parameters": 750, "bytes": 1500, "layers": 3, "perplexity": {"near": 11.0, "far": 24.0}},
    "champion": {"parameters": 800, "bytes": 1600, "layers": 3, "perplexity": {"near": 11.0, "far": 30.0}},
    "pruned-first": {"parameters": 750, "bytes": 1500, "layers": 3, "perplexity": {"near": 12.5, "far": 24.0}},
}
for name, pace in (("dense", 100.0), ("candidate", 130.0)):
    MODELS[name]["speed"] = {
        "prefill": {"1": {"tokens_per_second": pace}, "8": {"tokens_per_second": 4 * pace + 20}},
        "decode": {"1": {"tokens_per_second": pace / 10}, "8": {"tokens_per_second": pace / 2}},
    }

MISSING = object()


def verdict(rules: str, **changed: Any) -> Verdict:
    """Judge the models by `rules`; `candidate__perplexity__near=nan` changes a number, MISSING takes it away."""
    models = copy.deepcopy(MODELS)
    for path, value in changed.items():
        *parts, leaf = path.split("__")
        place = models
        for part in parts:
            place = place[part]
        if value is MISSING:
            del place[leaf]
        else:
            place[leaf] = value
    recipe = parse_recipe(BASE.replace("RULES", rules))
    return judge({name: Measured.model_validate(model) for name, model in models.items()}, recipe)


@pytest.mark.parametrize(
    ("rule", "applied", "values", "holds", "fails"),
    [
        ("perplexity_over_dense", ("near", "far"), (1.1, 1.2), 1.2, 1.19),
        ("perplexity_over_control", ("near", "far"), (0.88, 1.0), 1.0, 0.99),
        ("perplexity_over_champion", ("near", "far"), (1.0, 0.8), 1.0, 0.99),
        ("parameters_over_dense", (), (0.75,), 0.75, 0.74),
        ("prefill_speedup", ("1", "8"), (1.3, 540 / 420), 1.28, 1.29),
        ("decode_speedup", ("1", "8"), (1.3, 1.3), 1.3, 1.31),
    ],
)
def test_each_rule_holds_at_its_threshold_and_fails_beyond_it(
    rule: str, applied: tuple[str, ...], values: tuple[float, ...], holds: float, fails: float
) -> None:
    held = verdict(f"{rule}: {holds}")
    assert [one.name for one in held.rules] == ([f"{rule}[{part}]" for part in applied] or [rule])
    assert [one.value for one in held.rules] == pytest.approx(values)
    assert held.passed
    assert all(one.passed and one.threshold == holds for one in held.rules)
    broken = verdict(f"{rule}: {fails}")
    assert not broken.passed
    assert broken.failed


def test_one_text_out_of_bounds_fails_the_whole_and_is_named() -> None:
    found = verdict("perplexity_over_dense: 1.15")
    assert [(one.name, one.passed) for one in found.rules] == [
        ("perplexity_over_dense[near]", True),
        ("perplexity_over_dense[far]", False),
    ]
    assert not found.passed
    assert [one.name for one in found.failed] == ["perplexity_over_dense[far]"]
    assert found.rules[1].compared == {"candidate": 24.0, "dense": 20.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, MISSING, 0.0])
@pytest.mark.parametrize("model", ["candidate", "dense"])
def test_a_perplexity_that_is_no_number_fails_its_rule_alone(model: str, value: Any) -> None:
    found = verdict("perplexity_over_dense: 100", **{f"{model}__perplexity__near": value})
    near, far = found.rules
    assert (near.passed, near.value) == (False, None)
    assert near.note == f"not measured: perplexity on near of {model}"
    assert far.passed
    assert not found.passed


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_speed_that_is_no_number_fails_its_rule(value: Any) -> None:
    found = verdict("prefill_speedup: 0.01", candidate__speed__prefill__8__tokens_per_second=value)
    assert [one.passed for one in found.rules] == [True, False]


@pytest.mark.parametrize("left_out", ["candidate__speed__decode__8", "candidate__speed__decode", "dense__speed"])
def test_a_batch_a_phase_or_all_speed_left_out_fails(left_out: str) -> None:
    found = verdict("decode_speedup: 0.01", **{left_out: MISSING})
    assert [one.name for one in found.rules] == ["decode_speedup[1]", "decode_speedup[8]"]
    assert not found.passed


def test_a_control_that_was_not_measured_fails_its_rule() -> None:
    found = verdict("perplexity_over_control: 100", **{"pruned-first": MISSING})
    assert [one.passed for one in found.rules] == [False, False]
    assert "pruned-first" in found.rules[0].note


def test_the_champions_rule_holds_where_there_is_no_champion_and_says_so() -> None:
    found = verdict("perplexity_over_champion: 0.5", champion=MISSING)
    assert found.passed
    assert [(one.passed, one.value, one.note) for one in found.rules] == [(True, None, "there is no champion yet")] * 2


def test_a_champion_without_the_number_fails() -> None:
    assert not verdict("perplexity_over_champion: 100", champion__perplexity__near=math.nan).passed


def test_without_rules_every_candidate_passes() -> None:
    assert verdict("{}".strip("{}")) == Verdict(passed=True, rules=())


def test_ratio_is_none_unless_both_are_finite_and_above_zero() -> None:
    assert ratio(3.0, 2.0) == 1.5
    for value, base in ((None, 1.0), (1.0, None), (math.nan, 1.0), (1.0, math.inf), (1.0, 0.0), (-1.0, 1.0)):
        assert ratio(value, base) is None


def test_an_evaluation_keeps_the_models_there_are(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": {**MODELS, "champion": None}}))
    assert list(read_evaluation(tmp_path)) == ["dense", "candidate", "pruned-first"]


def test_an_evaluation_without_a_candidate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": {"dense": MODELS["dense"]}}))
    with pytest.raises(Refusal, match=r"measured dense but no 'candidate'"):
        read_evaluation(tmp_path)
