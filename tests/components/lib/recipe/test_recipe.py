"""The recipe: what it takes, what it refuses in one sentence with the cure, and that nothing is lost on the way to a stage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from components.lib.errors import Refusal
from components.lib.recipe.schema import Objective, Recipe, Text, methods, plain

SMALLEST = {
    "method": "trsp",
    "target": {"ratio": 0.25},
    "calibration": {"data": "train.txt"},
    "evaluate": {"perplexity": {"test": "test.txt"}},
}
REFERENCE = f"s3://bucket/texts/{'0' * 64}@sha256:{'a' * 64}"


def settings(**changed: Any) -> dict[str, Any]:
    """The smallest recipe, with the values at these dotted names (`__` for the dot) put in; None takes a field away."""
    made: dict[str, Any] = copy.deepcopy(SMALLEST)
    for dotted, value in changed.items():
        *path, leaf = dotted.split("__")
        section = made
        for part in path:
            section = section.setdefault(part, {})
        section[leaf] = value
        if value is None:
            del section[leaf]
    return made


def recipe(*overrides: str, **changed: Any) -> Recipe:
    return Recipe.from_yaml(yaml.safe_dump(settings(**changed)), overrides)


def refusal(*overrides: str, **changed: Any) -> str:
    with pytest.raises(Refusal) as refused:
        recipe(*overrides, **changed)
    return str(refused.value)


class TestTheSmallestRecipe:
    def test_is_four_fields_and_the_defaults_of_the_rest(self) -> None:
        made = recipe()
        assert made.calibration.samples == 128
        assert made.regularize.schedule == "anneal"
        assert not made.recover.enabled
        assert made.evaluate.controls == ()

    def test_anneals_as_long_as_it_says_and_layers_longer_than_channels_where_it_does_not(self) -> None:
        assert recipe().regularize.annealing(layers=True) > recipe().regularize.annealing(layers=False) > 0
        assert {recipe(regularize__anneal=0.3).regularize.annealing(layers) for layers in (True, False)} == {0.3}

    @pytest.mark.parametrize("field", ["method", "target", "calibration", "evaluate"])
    def test_needs_each_of_them(self, field: str) -> None:
        assert refusal(**{field: None}).startswith(f"the recipe's field '{field}' is missing: add it (")

    def test_says_what_a_missing_field_is_for(self) -> None:
        assert "The text the windows are drawn from" in refusal(calibration__data=None)

    def test_is_evaluated_at_the_length_it_is_calibrated_at(self) -> None:
        assert recipe().evaluate.length == 2048
        assert recipe(calibration__length=256).evaluate.length == 256
        assert recipe(calibration__length=256, evaluate__length=512).evaluate.length == 512


class TestAnUnknownField:
    def test_is_refused_with_the_nearest_known_one(self) -> None:
        assert refusal(target__ratoi=0.5) == "the recipe's field 'target.ratoi' is not known: did you mean 'ratio'?"
        assert refusal(regularise={}) == "the recipe's field 'regularise' is not known: did you mean 'regularize'?"

    def test_is_refused_with_all_known_ones_where_none_is_near(self) -> None:
        assert (
            refusal(target__zzz=1, evaluate__speed__batches=[1])
            == "the recipe's field 'target.zzz' is not known: known there are ratio"
        )

    def test_is_found_inside_a_named_text(self) -> None:
        said = refusal(evaluate__perplexity={"test": {"path": "x.txt", "feild": "body"}})
        assert said == "the recipe's field 'evaluate.perplexity.test.feild' is not known: did you mean 'field'?"

    def test_is_told_with_how_many_more_faults_there_are(self) -> None:
        assert refusal(target__ratoi=0.5, gates__stpes=1).endswith("(and 1 more)")


class TestAValueThatIsNotAllowed:
    @pytest.mark.parametrize("ratio", [0, 1, -0.25, 1.5, float("nan")])
    def test_is_a_ratio_that_removes_nothing_or_everything(self, ratio: float) -> None:
        assert refusal(target__ratio=ratio).startswith(f"the recipe's field 'target.ratio' is {ratio!r}: ")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("calibration__samples", 0),
            ("calibration__length", 7),
            ("gates__strategy", "twice"),
            ("gates__strength", float("inf")),
            ("regularize__learning_rate", 0),
            ("regularize__anneal", 0.0),
            ("regularize__steps", 1.5),
            ("evaluate__perplexity", {}),
            ("evaluate__controls", ["pruned-last"]),
            ("promote__perplexity_over_dense", float("nan")),
            ("recover__enabled", "perhaps"),
        ],
    )
    def test_is_named_with_its_field(self, field: str, value: Any) -> None:
        dotted = field.replace("__", ".")
        assert refusal(**{field: value}).startswith(f"the recipe's field '{dotted}")

    def test_is_a_method_that_is_not_there(self) -> None:
        said = refusal(method="tsrp")
        assert (
            said
            == "the recipe's method 'tsrp' is not known: use one of dress, shortgpt, sleb, trsp: did you mean 'trsp'?"
        )

    def test_is_a_batch_that_its_parts_do_not_fill(self) -> None:
        said = refusal(regularize={"batch_size": 8, "micro_batch_size": 3})
        assert said == "the recipe's regularize: batch_size 8 is not a multiple of micro_batch_size 3"

    def test_is_an_objective_of_nothing(self) -> None:
        assert "give one of them a weight" in refusal(regularize__objective={"lm": 0, "kl": 0, "state": 0})

    @pytest.mark.parametrize("name", ["wiki text", "wiki.v2", "a/b", ""])
    def test_is_a_texts_name_that_could_not_be_addressed(self, name: str) -> None:
        said = refusal(evaluate__perplexity={name: "test.txt"})
        assert said == (
            f"the recipe's evaluate.perplexity.{name}: {name!r} cannot name a text: use letters, digits, '_' and '-'"
        )


class TestFieldsThatDoNotGoTogether:
    def test_gates_are_trsps(self) -> None:
        assert (
            refusal(method="sleb", gates={}) == "the recipe's method 'sleb' learns no gates: remove the section 'gates'"
        )

    def test_controls_compare_with_a_training(self) -> None:
        said = refusal(regularize__schedule="none", evaluate__controls=["dense-trained"])
        assert said.endswith("regularize.schedule is none: set evaluate.controls to []")

    def test_a_rule_on_a_control_needs_the_control(self) -> None:
        rule = {"promote__perplexity_over_control": 1.0}
        assert refusal(**rule, evaluate__controls=["dense-trained"]).endswith("add pruned-first to evaluate.controls")
        assert recipe(**rule, evaluate__controls=["pruned-first"]).promote.perplexity_over_control == 1.0


class TestMethods:
    def test_are_one_or_one_of_layers_and_then_dress(self) -> None:
        assert recipe().methods == ("trsp",)
        assert recipe(method="dress").methods == ("dress",)
        assert recipe(method=["trsp", "dress"]).methods == ("trsp", "dress")
        assert recipe("method=[sleb, dress]").methods == ("sleb", "dress")

    @pytest.mark.parametrize(
        "method", [["dress", "trsp"], ["sleb", "trsp"], ["dress", "dress"], ["trsp", "sleb", "dress"]]
    )
    def test_of_another_kind_or_order_are_refused(self, method: list[str]) -> None:
        said = refusal(method=method)
        assert said.startswith(f"the recipe's method is {method}: name one method, or one that removes layers and then")

    def test_that_are_none_are_refused(self) -> None:
        assert refusal(method=[]).startswith("the recipe's ")

    def test_that_are_not_there_are_refused_by_name(self) -> None:
        said = refusal(method=["trsp", "dres"])
        assert said.startswith("the recipe's method 'dres' is not known")
        assert said.endswith("did you mean 'dress'?")

    def test_of_which_one_is_trsp_may_have_gates(self) -> None:
        assert recipe(method=["trsp", "dress"], gates__steps=5).gates.steps == 5
        assert "learns no gates" in refusal(method="dress", gates__steps=5)
        assert "learns no gates" in refusal(method=["sleb", "dress"], gates__steps=5)


class TestDress:
    @pytest.mark.parametrize("method", ["trsp", "sleb"])
    def test_is_a_section_of_its_own_method_s(self, method: str) -> None:
        said = refusal(method=method, dress__axes=["ffn"])
        assert said == (
            f"the recipe's method {method!r} chooses no channels: remove the section 'dress', or add dress to method"
        )

    def test_takes_target_s_ratio_one_of_its_own_or_one_for_each_axis(self) -> None:
        axes = {"method": "dress", "dress__axes": ["hidden", "ffn"]}
        assert recipe(**axes).dress.ratios(0.25) == {"hidden": 0.25, "ffn": 0.25}
        assert recipe(**axes, dress__ratio=0.5).dress.ratios(0.25) == {"hidden": 0.5, "ffn": 0.5}
        each = {"hidden": 0.1, "ffn": 0.6}
        assert recipe(**axes, dress__ratio=each).dress.ratios(0.25) == each

    def test_names_an_axis_once(self) -> None:
        said = refusal(method="dress", dress__axes=["ffn", "ffn"])
        assert said == "the recipe's dress: dress.axes ['ffn', 'ffn'] names an axis twice: name each once"

    @pytest.mark.parametrize("ratio", [{"ffn": 0.5}, {"ffn": 0.5, "hidden": 0.5, "heads": 0.5}, {}])
    def test_names_the_same_axes_in_axes_and_ratio(self, ratio: dict[str, float]) -> None:
        said = refusal(method="dress", dress__axes=["ffn", "hidden"], dress__ratio=ratio)
        assert said.endswith(
            f"dress.ratio names {sorted(ratio)} and dress.axes ['ffn', 'hidden']: name the same axes in both"
        )

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("axes", []),
            ("axes", ["width"]),
            ("ratio", 0),
            ("ratio", 1.0),
            ("ratio", {"ffn": 1.5}),
            ("ratio", {"width": 0.5}),
            ("channels", "largest"),
            ("multiple", 0),
        ],
    )
    def test_refuses_a_value_that_is_not_allowed_by_its_field(self, field: str, value: Any) -> None:
        said = refusal(method="dress", **{f"dress__{field}": value})
        assert said.startswith(f"the recipe's field 'dress.{field}")

    def test_of_a_penalty_needs_weights_that_train(self) -> None:
        penalty = {"regularize__schedule": "penalty", "regularize__trainable": "lora"}
        said = refusal(method=["trsp", "dress"], **penalty)
        assert "which adapters do not train: set regularize.trainable to all, or the schedule to anneal" in said
        assert recipe(method="trsp", **penalty).regularize.trainable == "lora"
        assert recipe(method="dress", regularize__trainable="lora").regularize.schedule == "anneal"

    def test_comes_back_from_its_yaml(self) -> None:
        made = recipe(method=["trsp", "dress"], dress__axes=["ffn", "heads"], dress__ratio={"ffn": 0.5, "heads": 0.25})
        assert Recipe.from_yaml(made.to_yaml()) == made


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
        assert made.calibration.data == Text(path=REFERENCE, field="body")
        assert made.evaluate.perplexity["test"] == Text(path="test.txt")

    @given(
        st.dictionaries(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,9}", fullmatch=True), st.just("a.txt"), min_size=1)
    )
    def test_of_any_name_can_be_replaced(self, texts: dict[str, str]) -> None:
        made = recipe(evaluate__perplexity=texts)
        pinned = made.with_texts({dotted: REFERENCE for dotted, _ in made.texts()})
        assert {text.path for _, text in pinned.texts()} == {REFERENCE}
        assert pinned.evaluate.perplexity.keys() == texts.keys()


class TestAnOverride:
    def test_takes_the_place_of_the_recipes_value(self) -> None:
        made = recipe("target.ratio=0.5", "evaluate.controls=[dense-trained]", "recover.enabled=true")
        assert (made.target.ratio, made.evaluate.controls, made.recover.enabled) == (0.5, ("dense-trained",), True)

    def test_makes_the_sections_it_needs(self) -> None:
        assert recipe("regularize.objective.kl=2").regularize.objective == Objective(kl=2)

    def test_adds_a_text(self) -> None:
        made = recipe("evaluate.perplexity.web=web.parquet")
        assert made.evaluate.perplexity["web"].path == "web.parquet"

    def test_later_ones_win(self) -> None:
        assert recipe("target.ratio=0.5", "target.ratio=0.75").target.ratio == 0.75

    @pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001"])
    def test_reads_a_number_as_a_person_writes_it(self, written: str) -> None:
        assert recipe(f"regularize.learning_rate={written}").regularize.learning_rate == 1e-4

    def test_gives_no_value_back_to_the_default(self) -> None:
        assert recipe("evaluate.length=null", evaluate__length=64, calibration__length=32).evaluate.length == 32

    def test_of_an_unknown_field_is_refused_like_one_in_the_file(self) -> None:
        assert refusal("target.ratoi=0.5") == "the recipe's field 'target.ratoi' is not known: did you mean 'ratio'?"

    @pytest.mark.parametrize("override", ["target.ratio", "=0.5"])
    def test_without_a_key_or_a_value_is_refused(self, override: str) -> None:
        assert refusal(override) == f"--set {override!r} has no value: write --set dotted.key=value"

    def test_that_is_no_yaml_is_refused(self) -> None:
        assert refusal("evaluate.tasks=[piqa").endswith("which is not YAML: quote it")


class TestTheYaml:
    def test_gives_an_equal_recipe_back_and_says_no_more_than_was_set(self) -> None:
        made = recipe("regularize.learning_rate=3e-5", evaluate__controls=["pruned-first"])
        assert Recipe.from_yaml(made.to_yaml()) == made
        assert "recover" not in made.to_yaml()

    def test_keeps_a_recipe_of_another_method_free_of_gates(self) -> None:
        made = recipe(method="sleb").with_texts({"calibration.data": REFERENCE})
        assert Recipe.from_yaml(made.to_yaml()).method == "sleb"

    @pytest.mark.parametrize("text", ["", "just words", "- a\n- list", "42"])
    def test_that_is_no_mapping_is_refused(self, text: str) -> None:
        with pytest.raises(Refusal, match="is not a mapping of sections: start from one of the shipped recipes"):
            Recipe.from_yaml(text)

    def test_that_cannot_be_parsed_is_refused_in_one_line_that_says_where(self) -> None:
        with pytest.raises(Refusal, match=r"the recipe is not YAML: .*line 2") as refused:
            Recipe.from_yaml("method: trsp\ntarget: {ratio: 0.5")
        assert "\n" not in str(refused.value)


class TestTheFile:
    def test_is_read_with_its_overrides(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SMALLEST))
        assert Recipe.load(tmp_path / "recipe.yaml", ["target.ratio=0.5"]).target.ratio == 0.5

    def test_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            Refusal, match=r"cannot be read \(No such file or directory\): name a YAML file or a shipped"
        ):
            Recipe.load(tmp_path / "recipe.yaml")

    def test_that_is_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Refusal, match=r"cannot be read \(Is a directory\)"):
            Recipe.load(tmp_path)

    def test_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(Refusal, match=r"cannot be read \(it is no text\)"):
            Recipe.load(tmp_path / "model.safetensors")


def test_a_recipe_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().target.ratio = 0.5  # type: ignore[misc]


def test_a_method_is_a_file_of_the_methods_folder() -> None:
    assert methods() == ("dress", "shortgpt", "sleb", "trsp")


def test_sections_are_plain_data_for_json() -> None:
    assert plain({"method": "trsp", "target": recipe().target}) == {"method": "trsp", "target": {"ratio": 0.25}}
