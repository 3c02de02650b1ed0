"""A candidate is judged rule by rule, and what was not measured cannot hold."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.schema import Recipe
from components.register.measured import Context, Measured, ratio, read_evaluation, unlike
from components.register.verdict import Verdict, judge

BASE: dict[str, Any] = {
    "methods": {"trsp": {"ratio": 0.25}},
    "calibration": {"data": "calibration.txt"},
    "evaluate": {
        "perplexity": {"near": f"s3://b/near@sha256:{'a' * 64}", "far": f"s3://b/far@sha256:{'b' * 64}"},
        "length": 256,
        "controls": ["pruned-first", "dense-trained"],
        "speed": {"batches": [1, 8], "prompt": 64, "generate": 8},
        "task_limit": 500,
    },
}

CONTEXT: dict[str, Any] = {
    "length": 256,
    "digests": {"near": "a" * 64, "far": "b" * 64},
    "task_limit": 500,
    "versions": {"lm_eval": "0.4.9"},
    "speed": {"prompt": 64, "generate": 8},
}

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
    MODELS[name]["peak_memory"] = 5000 if name == "dense" else 3850
MODELS["dense"]["tasks"] = {
    "piqa": {"acc": 0.80, "acc_stderr": 0.01},
    "arc": {"acc_norm": 0.5, "acc_norm_stderr": 0.01},
}
MODELS["candidate"]["tasks"] = {
    "piqa": {"acc": 0.76, "acc_stderr": 0.01},
    "arc": {"acc_norm": 0.4, "acc_norm_stderr": 0.01},
}

MISSING = object()


def verdict(figure: str, bound: float, against: str = "dense", on: tuple[str, ...] = (), **changed: Any) -> Verdict:
    """Judge the models by one rule, called `it`.

    `candidate__perplexity__near=nan` changes a number, `context__length=512` how all of them were measured; MISSING takes a
    number away.
    """
    found = copy.deepcopy({**MODELS, "context": CONTEXT})
    for path, value in changed.items():
        *parts, leaf = path.replace("pruned_first", "pruned-first").split("__")
        place = found
        for part in parts:
            place = place[part]
        if value is MISSING:
            del place[leaf]
        else:
            place[leaf] = value
    rule = {"figure": figure, "against": against, "bound": bound, "on": list(on), "why": "it matters"}
    recipe = Recipe.model_validate({**BASE, "promote": {"rules": {"it": rule}}})
    context = Context.model_validate(found.pop("context"))
    return judge({name: Measured.model_validate(model) for name, model in found.items()}, recipe, context)


@pytest.mark.parametrize(
    ("figure", "against", "parts", "values", "holds", "fails"),
    [
        ("perplexity", "dense", ("near", "far"), (1.1, 1.2), 1.2, 1.19),
        ("perplexity", "pruned-first", ("near", "far"), (0.88, 1.0), 1.0, 0.99),
        ("perplexity", "champion", ("near", "far"), (1.0, 0.8), 1.0, 0.99),
        ("parameters", "dense", (), (0.75,), 0.75, 0.74),
        ("bytes", "champion", (), (0.9375,), 0.9375, 0.93),
        ("peak_memory", "dense", (), (0.77,), 0.77, 0.76),
        ("prefill", "dense", ("1", "8"), (1.3, 540 / 420), 1.28, 1.29),
        ("decode", "dense", ("1", "8"), (1.3, 1.3), 1.3, 1.31),
        ("accuracy", "dense", ("piqa", "arc"), (0.95, 0.8), 0.77, 0.78),
        ("mean_accuracy", "dense", (), (0.58 / 0.65,), 0.876, 0.878),
    ],
)
def test_each_rule_holds_at_its_bound_and_fails_beyond_it(
    figure: str, against: str, parts: tuple[str, ...], values: tuple[float, ...], holds: float, fails: float
) -> None:
    held = verdict(figure, holds, against)
    assert [one.name for one in held.rules] == ([f"it[{part}]" for part in parts] or ["it"])
    assert [one.value for one in held.rules] == pytest.approx(values, rel=1e-3)
    assert held.passed
    assert all(one.passed and one.bound == holds and one.why == "it matters" for one in held.rules)
    assert not verdict(figure, fails, against).passed


def test_the_standard_error_counts_against_the_candidate() -> None:
    """r = 0.76 / 0.80 = 0.95 with the error r·√((0.01/0.76)² + (0.01/0.80)²) = 0.0172."""
    held, broken = verdict("accuracy", 0.932, on=("piqa",)), verdict("accuracy", 0.933, on=("piqa",))
    assert (held.passed, broken.passed) == (True, False)
    assert broken.rules[0].value == pytest.approx(0.95)
    assert broken.rules[0].error == pytest.approx(0.01724, rel=1e-3)
    assert broken.rules[0].told == "0.950× ± 0.017, asked at least 0.933×"


def test_an_accuracy_without_its_standard_error_fails() -> None:
    found = verdict("accuracy", 0.1, on=("piqa",), candidate__tasks__piqa__acc_stderr=MISSING)
    assert (found.passed, found.rules[0].told) == (False, "its standard error is not known")


def test_a_rule_may_apply_to_some_texts_only() -> None:
    found = verdict("perplexity", 1.15, on=("near",))
    assert [(one.name, one.passed) for one in found.rules] == [("it[near]", True)]


def test_one_text_out_of_bounds_fails_the_whole_and_is_named() -> None:
    found = verdict("perplexity", 1.15)
    assert [(one.name, one.passed) for one in found.rules] == [("it[near]", True), ("it[far]", False)]
    assert (found.passed, found.word) == (False, "fail")
    assert [one.name for one in found.failed] == ["it[far]"]
    assert found.rules[1].compared == {"candidate": 24.0, "dense": 20.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, MISSING, 0.0])
@pytest.mark.parametrize("model", ["candidate", "dense"])
def test_a_perplexity_that_is_no_number_fails_its_rule_alone(model: str, value: Any) -> None:
    found = verdict("perplexity", 100, **{f"{model}__perplexity__near": value})
    near, far = found.rules
    assert (near.passed, near.value) == (False, None)
    assert near.told == f"not measured: perplexity on near of {model}"
    assert far.passed
    assert not found.passed


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_speed_that_is_no_number_fails_its_rule(value: Any) -> None:
    found = verdict("prefill", 0.01, candidate__speed__prefill__8__tokens_per_second=value)
    assert [one.passed for one in found.rules] == [True, False]


@pytest.mark.parametrize("left_out", ["candidate__speed__decode__8", "candidate__speed__decode", "dense__speed"])
def test_a_batch_a_phase_or_all_speed_left_out_fails(left_out: str) -> None:
    found = verdict("decode", 0.01, **{left_out: MISSING})
    assert [one.name for one in found.rules] == ["it[1]", "it[8]"]
    assert not found.passed


@pytest.mark.parametrize(
    ("figure", "left_out", "note"),
    [
        ("peak_memory", "candidate__peak_memory", "not measured: peak memory of candidate"),
        ("accuracy", "candidate__tasks", "not measured: accuracy on piqa of candidate"),
        ("accuracy", "dense__tasks", "not measured: accuracy of candidate and of dense"),
        ("mean_accuracy", "candidate__tasks__arc", "not measured: mean accuracy of candidate"),
        ("mean_accuracy", "dense__tasks", "not measured: mean accuracy of candidate and of dense"),
    ],
)
def test_a_figure_that_was_not_measured_fails_its_rule(figure: str, left_out: str, note: str) -> None:
    found = verdict(figure, 100 if figure == "peak_memory" else 0.01, **{left_out: MISSING})
    assert (found.passed, found.rules[0].told) == (False, note)


@pytest.mark.parametrize(
    ("figure", "measured", "value", "note"),
    [
        ("perplexity", "length", 512, "measured with windows of 512 tokens, not of 256"),
        ("perplexity", "length", None, "measured with windows of unknown tokens, not of 256"),
        ("perplexity", "digests", {"near": "c" * 64}, "measured on another text than near is now"),
        ("perplexity", "digests", {}, "measured on another text than near is now"),
        ("accuracy", "versions", {"lm_eval": None}, "measured with an unknown version of lm-eval"),
        ("mean_accuracy", "task_limit", None, "measured on all examples a task, not on 500"),
        ("prefill", "speed", {"prompt": 32, "generate": 8}, "measured with 32 tokens of prompt, not with 64"),
        ("decode", "speed", {"backend": "vllm"}, "measured with vllm, not with transformers"),
        ("peak_memory", "speed", {}, "measured with unknown tokens of prompt, not with 64"),
    ],
)
def test_a_figure_that_was_measured_otherwise_fails_its_rule(figure: str, measured: str, value: Any, note: str) -> None:
    bound = 100 if figure in ("perplexity", "peak_memory") else 0.01
    assert verdict(figure, bound).passed
    found = verdict(figure, bound, **{f"context__{measured}": value})
    assert (found.passed, found.rules[0].value, found.rules[0].told) == (False, None, note)


def test_figures_of_two_evaluations_compare_only_with_one_version_of_the_harness() -> None:
    one, other = (Context(versions={"lm_eval": version}) for version in ("0.4.9", "0.5.0"))
    assert unlike("accuracy", "piqa", one, other) == "measured with lm-eval 0.4.9, not 0.5.0"
    assert unlike("accuracy", "piqa", one, one) == ""
    assert unlike("bytes", "", one, other) == ""


def test_speeds_of_two_evaluations_compare_only_on_one_machine() -> None:
    one, other = (Context(device="cpu", cpu=cpu, threads=2) for cpu in ("Xeon", "EPYC"))
    assert unlike("decode", "1", one, other) == "measured on Xeon with 2 threads, not on EPYC with 2 threads"
    assert unlike("decode", "1", one, one) == ""
    assert unlike("peak_memory", "", one, other) == ""


def test_a_control_that_was_not_measured_fails_its_rule() -> None:
    found = verdict("perplexity", 100, "pruned-first", pruned_first=MISSING)
    assert [one.passed for one in found.rules] == [False, False]
    assert "pruned-first" in found.rules[0].note


def test_the_champions_rule_holds_where_there_is_no_champion_and_says_so() -> None:
    found = verdict("perplexity", 0.5, "champion", champion=MISSING)
    assert found.passed
    assert [(one.passed, one.value, one.note) for one in found.rules] == [(True, None, "there is no champion yet")] * 2


def test_a_champion_without_the_number_fails() -> None:
    """So does one whose context is shorter than the windows: its perplexity is not measured."""
    assert not verdict("perplexity", 100, "champion", champion__perplexity__near=math.nan).passed


def test_without_rules_every_candidate_passes() -> None:
    models = {name: Measured.model_validate(model) for name, model in MODELS.items()}
    assert judge(models, Recipe.model_validate(BASE), Context()) == Verdict(passed=True, rules=())


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


class TestATarget:
    def judged(self, **target: float) -> Verdict:
        recipe = Recipe.model_validate({**BASE, "evaluate": {**BASE["evaluate"], "tasks": ["piqa"]}, "target": target})
        models = {name: Measured.model_validate(model) for name, model in MODELS.items()}
        return judge(models, recipe, Context.model_validate(CONTEXT))

    @pytest.mark.parametrize(
        ("field", "holds", "fails", "names"),
        [
            ("max_perplexity_ratio", 1.2, 1.19, ["[near]", "[far]"]),
            ("min_accuracy_recovery", 0.876, 0.878, [""]),
            ("min_speedup", 1.28, 1.29, ["[1]", "[8]"]),
            ("max_bytes", 1500, 1499, [""]),
        ],
    )
    def test_is_confirmed_on_what_is_evaluated(self, field: str, holds: float, fails: float, names: list[str]) -> None:
        held = self.judged(**{field: holds})
        assert [one.name for one in held.rules] == [f"target.{field}{name}" for name in names]
        assert held.passed
        assert held.target_holds
        assert not self.judged(**{field: fails}).target_holds

    def test_is_apart_from_the_other_rules(self) -> None:
        assert verdict("perplexity", 0.5).target_holds


@pytest.mark.parametrize(
    ("signature", "required", "passed"),
    [
        ("unsigned", False, True),
        ("unsigned", True, False),
        ("signed, not verified: no key", True, False),
        ("signed by key sha256:1", True, True),
        ("signed by key sha256:1", False, True),
    ],
)
def test_a_required_signature_must_hold_and_the_verdict_says_whose_it_is(
    signature: str, required: bool, passed: bool
) -> None:
    models = {name: Measured.model_validate(model) for name, model in MODELS.items()}
    recipe = Recipe.model_validate(BASE | {"promote": {"require_signature": required}})
    verdict = judge(models, recipe, Context(), signature)
    assert (verdict.passed, verdict.signature) == (passed, signature)
    assert [(rule.name, rule.note) for rule in verdict.rules] == [("require_signature", signature)] * required
