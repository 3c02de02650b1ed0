"""The recipe: what it takes, which fields go together, and that nothing is lost on the way to a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from components.lib.methods import known_methods
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Corpus, Text
from components.lib.recipe.target import LIMIT
from tests.components.lib.recipe.smallest import REFERENCE, recipe, refusal

HALF = {"ratio": 0.5}
RULE = {"figure": "perplexity", "bound": 1.0, "why": "it matters"}


class TestTheSmallestRecipe:
    def test_is_three_fields_and_the_defaults_of_the_rest(self) -> None:
        made = recipe()
        assert made.calibration.samples == 128
        assert made.regularize.schedule == "anneal"
        assert not made.recover.enabled
        assert made.evaluate.controls == ()

    def test_is_evaluated_at_the_length_it_is_calibrated_at(self) -> None:
        assert recipe().evaluate.length == 2048
        assert recipe(calibration__length=256).evaluate.length == 256
        assert recipe(calibration__length=256, evaluate__length=512).evaluate.length == 512


class TestFieldsThatDoNotGoTogether:
    def test_controls_compare_with_a_training(self) -> None:
        said = refusal(regularize__schedule="none", evaluate__controls=["dense-trained"])
        assert said.endswith("regularize.schedule is none: set evaluate.controls to []")

    def test_a_rule_on_a_control_needs_the_control(self) -> None:
        rule = {"promote__rules__pays": {**RULE, "against": "pruned-first"}}
        said = refusal(**rule, evaluate__controls=["dense-trained"])
        assert said.endswith("promote.rules.pays needs its control: add pruned-first to evaluate.controls")
        assert recipe(**rule, evaluate__controls=["pruned-first"]).promote.rules["pays"].bound == 1.0

    def test_a_rule_applies_to_what_is_measured(self) -> None:
        said = refusal(promote__rules__near={**RULE, "on": ["tset"]})
        assert said.endswith("promote.rules.near.on names 'tset', which evaluate.perplexity does not have: it has test")
        said = refusal(promote__rules__fast={**RULE, "figure": "decode", "on": [3]})
        assert said.endswith("names '3', which evaluate.speed.batches does not have: it has 1, 8, 64")


class TestARule:
    def test_says_what_it_compares_and_why(self) -> None:
        made = recipe(promote__rules__quality=RULE).promote.rules["quality"]
        assert (made.figure, made.against, made.bound, made.at_least) == ("perplexity", "dense", 1.0, False)
        assert refusal(promote__rules__quality={**RULE, "why": None}).startswith(
            "the recipe's field 'promote.rules.quality.why' is None"
        )
        without = {"figure": "perplexity", "bound": 1.0}
        assert refusal(promote__rules__quality=without).startswith(
            "the recipe's field 'promote.rules.quality.why' is missing: add it (The reason for the rule"
        )

    @pytest.mark.parametrize("figure", ["accuracy", "mean_accuracy", "prefill", "decode"])
    def test_on_a_figure_that_should_be_high_has_a_lower_bound(self, figure: str) -> None:
        assert recipe(promote__rules__it={**RULE, "figure": figure}).promote.rules["it"].at_least

    def test_on_the_whole_model_has_no_parts(self) -> None:
        said = refusal(promote__rules__it={**RULE, "figure": "bytes", "on": ["test"]})
        assert said.endswith("bytes is one number for the whole model: leave out 'on'")

    def test_of_the_older_form_is_refused_with_the_present_one(self) -> None:
        assert refusal(promote__perplexity_over_control=0.9) == (
            "the recipe's field 'promote.perplexity_over_control' is of an older form, in which rules had no names: "
            "write promote.rules.NAME: {figure: perplexity, against: pruned-first, bound: 0.9, why: ...}"
        )

    def test_is_removed_on_the_command_line(self) -> None:
        assert recipe("promote.rules.it=null", promote__rules__it=RULE).promote.rules == {}


class TestMethods:
    @pytest.mark.parametrize("layers", ["trsp", "sleb", "shortgpt"])
    def test_are_one_of_layers_one_of_channels_or_one_of_each(self, layers: str) -> None:
        for names in ([layers], ["dress"], [layers, "dress"]):
            made = recipe(methods=dict.fromkeys(names, HALF))
            assert [method.name for method in made.methods.chosen] == names
            assert made.removes_layers == (layers in names)

    def test_choose_layers_before_channels_however_they_are_written(self) -> None:
        made = recipe(methods={"dress": HALF, "trsp": HALF})
        assert [method.removes for method in made.methods.chosen] == ["layers", "channels"]

    def test_of_which_two_remove_the_same_are_refused(self) -> None:
        said = refusal(methods={"trsp": HALF, "sleb": HALF, "dress": HALF})
        assert said == "the recipe's methods: methods sleb and trsp both remove layers: name one of them"

    def test_that_are_none_are_refused_with_those_there_are(self) -> None:
        said = refusal(methods={})
        assert (
            said
            == "the recipe's methods: methods names none: name one of dress, laco, last, prunecomp, random, replaceme, seam, shortgpt, sleb, taylor, trsp"
        )

    def test_that_are_a_list_are_refused(self) -> None:
        assert refusal(methods=["trsp", "dress"]).startswith("the recipe's field 'methods' is ['trsp', 'dress']: ")

    @pytest.mark.parametrize("method", ["trsp", "sleb", "shortgpt", "dress"])
    def test_have_a_batch_size_each_of_its_own(self, method: str) -> None:
        made = recipe(methods={method: HALF | {"batch_size": 2}})
        assert made.methods.chosen[0].model_dump()["batch_size"] == 2

    def test_come_back_from_their_yaml(self) -> None:
        dress = {"axes": ["ffn", "heads"], "ratio": {"ffn": 0.5, "heads": 0.25}}
        made = recipe(methods={"trsp": {"ratio": 0.25, "shortlist": 0}, "dress": dress})
        assert parse_recipe(made.to_yaml()) == made

    def test_have_a_field_for_each_file_of_the_methods_folder(self) -> None:
        assert list(known_methods()) == [
            "dress",
            "laco",
            "last",
            "prunecomp",
            "random",
            "replaceme",
            "seam",
            "shortgpt",
            "sleb",
            "taylor",
            "trsp",
        ]
        assert list(type(recipe().methods).model_fields) == list(known_methods())


class TestDress:
    def test_takes_one_ratio_or_one_for_each_axis(self) -> None:
        axes = {"axes": ["hidden", "ffn"]}
        for ratio, asked in ((0.25, (0.25, 0.25)), ({"hidden": 0.1, "ffn": 0.6}, (0.1, 0.6))):
            (method,) = recipe(methods={"dress": axes | {"ratio": ratio}}).methods.chosen
            assert (method.asked("hidden"), method.asked("ffn")) == asked
            assert (method.asked("heads"), method.asked("layers")) == (None, None)

    def test_names_an_axis_once(self) -> None:
        said = refusal(methods={"dress": {"ratio": 0.5, "axes": ["ffn", "ffn"]}})
        assert said == "the recipe's methods.dress: axes ['ffn', 'ffn'] names an axis twice: name each once"

    @pytest.mark.parametrize("ratio", [{"ffn": 0.5}, {"ffn": 0.5, "hidden": 0.5, "heads": 0.5}, {}])
    def test_names_the_same_axes_in_axes_and_ratio(self, ratio: dict[str, float]) -> None:
        said = refusal(methods={"dress": {"axes": ["ffn", "hidden"], "ratio": ratio}})
        assert said.startswith("the recipe's methods.dress: ")
        assert said.endswith(f"ratio names {sorted(ratio)} and axes ['ffn', 'hidden']: name the same axes in both")

    def test_of_a_penalty_needs_weights_that_train(self) -> None:
        penalty = {"regularize__schedule": "penalty", "regularize__trainable": "lora"}
        said = refusal(methods={"trsp": HALF, "dress": HALF}, **penalty)
        assert "which adapters do not train: set regularize.trainable to all, or the schedule to anneal" in said
        assert recipe(**penalty).regularize.trainable == "lora"
        assert recipe(methods={"dress": HALF}, regularize__trainable="lora").regularize.schedule == "anneal"


class TestTransfer:
    @pytest.mark.parametrize("written", ["none", {}])
    def test_is_none_unless_one_is_named(self, written: Any) -> None:
        assert recipe(regularize__transfer=written).regularize.transfer.chosen is None
        assert recipe().regularize.transfer.chosen is None


class TestAText:
    def test_that_is_a_string_is_a_path(self) -> None:
        assert Text.model_validate("a.txt") == Text(path="a.txt")
        assert Text.model_validate(Path("a.txt")) == Text(path="a.txt")

    @pytest.mark.parametrize("data", [{}, {"path": "a.txt", "hub": "owner/name"}, {"field": "body"}])
    def test_has_exactly_one_source(self, data: dict[str, str]) -> None:
        assert refusal(calibration__data=data).endswith("name exactly one of 'path' and 'hub'")

    def test_is_listed_under_its_dotted_name(self) -> None:
        made = recipe(evaluate__perplexity={"test": "test.txt", "web": {"hub": "owner/web"}})
        assert [(dotted, text.path or text.hub) for dotted, text in made.texts()] == [
            ("calibration.data", "train.txt"),
            ("evaluate.perplexity.test", "test.txt"),
            ("evaluate.perplexity.web", "owner/web"),
        ]

    def test_is_replaced_by_its_reference_and_keeps_its_field(self) -> None:
        data = {"hub": "owner/web", "split": "test", "field": "body"}
        made = recipe(calibration__data=data).with_texts({"calibration.data": REFERENCE})
        assert made.calibration.data == Corpus(path=REFERENCE, field="body")
        assert made.evaluate.perplexity["test"] == Text(path="test.txt")

    def test_of_this_machine_is_not_streamed(self) -> None:
        with pytest.raises(ValidationError, match=r"path 'web.parquet' is on this machine: name an s3:// folder"):
            Corpus(path="web.parquet", stream=True)

    def test_is_streamed_for_the_calibration_alone(self) -> None:
        with pytest.raises(ValidationError, match="stream"):
            Text(path="s3://bucket/web", stream=True)  # type: ignore[call-arg]

    @given(
        st.dictionaries(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,9}", fullmatch=True), st.just("a.txt"), min_size=1)
    )
    def test_of_any_name_can_be_replaced(self, texts: dict[str, str]) -> None:
        made = recipe(evaluate__perplexity=texts)
        pinned = made.with_texts({dotted: REFERENCE for dotted, _ in made.texts()})
        assert {text.path for _, text in pinned.texts()} == {REFERENCE}
        assert pinned.evaluate.perplexity.keys() == texts.keys()


def test_the_lengths_that_a_model_must_read_are_told_by_their_fields() -> None:
    speed = {"prompt": 30, "generate": 5}
    made = recipe(calibration__length=16, evaluate__length=24, evaluate__speed=speed)
    assert made.lengths() == {
        "calibration.length": 16,
        "evaluate.length": 24,
        "evaluate.speed.prompt + generate": 35,
    }
    served = recipe(calibration__length=16, evaluate__speed=speed | {"backend": "vllm"})
    assert served.lengths()["evaluate.speed.prompt + generate"] == 36
    quiet = recipe(calibration__length=16, evaluate__speed=speed | {"enabled": False})
    assert quiet.lengths() == {"calibration.length": 16, "evaluate.length": 16}


def test_a_recipe_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().calibration.samples = 5  # type: ignore[misc]


class TestTasks:
    def test_are_names_or_files(self) -> None:
        made = recipe(evaluate__tasks=["piqa", "tasks/", "own.yaml", REFERENCE])
        assert made.evaluate.named_tasks == ("piqa",)
        assert made.evaluate.task_files == ("tasks/", "own.yaml", REFERENCE)

    def test_that_are_files_are_replaced_by_references_in_their_places(self) -> None:
        made = recipe(evaluate__tasks=["tasks/", "piqa"]).with_tasks({"tasks/": REFERENCE})
        assert made.evaluate.tasks == (REFERENCE, "piqa")
        assert parse_recipe(made.to_yaml()) == made


def test_adapters_that_nobody_trains_cannot_be_kept() -> None:
    assert recipe(recover={"enabled": True, "keep_adapter": True}).recover.keep_adapter
    said = refusal(recover={"keep_adapter": True})
    assert "keep_adapter is true, but enabled is not, so no adapters are trained" in said
    assert "recover" in said


class TestATarget:
    def test_is_one_of_four(self) -> None:
        made = recipe(target={"max_perplexity_ratio": 1.15}).target
        assert made
        assert (made.field, made.figure, made.bound, made.of_quality) == (
            "max_perplexity_ratio",
            "perplexity",
            1.15,
            True,
        )
        assert refusal(target={"min_speedup": 1.3, "max_bytes": 100}).endswith(
            "target names 2 of max_perplexity_ratio, min_accuracy_recovery, min_speedup, max_bytes: name exactly one"
        )

    def test_fills_in_a_ratio_that_is_not_named(self) -> None:
        made = recipe(methods={"trsp": {"steps": 3}, "dress": HALF}, target={"min_speedup": 1.3})
        assert [method.asked("layers") or method.asked("ffn") for method in made.methods.chosen] == [LIMIT, 0.5]
        assert "'methods.trsp.ratio' is missing" in refusal(methods={"trsp": {"steps": 3}})

    def test_is_measured_after_the_recipes_transfer(self) -> None:
        made = recipe(regularize={"transfer": "ridge"}, target={"max_perplexity_ratio": 1.15})
        assert made.target
        assert made.target.transfer == made.regularize.transfer
        assert parse_recipe(made.to_yaml()) == made

    def test_that_the_evaluation_cannot_confirm_is_refused(self) -> None:
        assert refusal(target={"min_accuracy_recovery": 0.95}).endswith("name them in evaluate.tasks")
        quiet = refusal(target={"min_speedup": 1.3}, evaluate__speed={"enabled": False})
        assert quiet.endswith("set evaluate.speed.enabled to true")

    def test_is_kept_with_other_ratios(self) -> None:
        made = recipe(target={"max_perplexity_ratio": 1.15}).with_ratios({"trsp": 0.125})
        assert made.target
        assert made.methods.chosen[0].asked("layers") == 0.125


class TestAProtocolOfThePapers:
    def test_replaces_the_fields_and_stays_the_same_when_it_is_written(self) -> None:
        latency = recipe(evaluate__speed={"protocol": "latency", "batches": [8], "prompt": 512})
        speed = latency.evaluate.speed
        assert (speed.batches, speed.prompt, speed.generate, speed.repeats) == ((1,), 2048, 0, 50)
        assert parse_recipe(latency.to_yaml()) == latency

    def test_of_throughput_writes_128_tokens(self) -> None:
        speed = recipe(evaluate__speed={"protocol": "throughput"}).evaluate.speed
        assert (speed.batches, speed.prompt, speed.generate + 1, speed.repeats) == ((64,), 64, 128, 10)
