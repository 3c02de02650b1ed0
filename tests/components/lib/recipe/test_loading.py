"""Reading a recipe: the YAML, the file, overrides, and recipes of the older form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from components.lib.errors import Refusal
from components.lib.recipe.loading import load_recipe, parse_recipe
from components.lib.recipe.training import Objective
from tests.components.lib.recipe.smallest import REFERENCE, SMALLEST, recipe, refusal


class TestAnOverride:
    def test_takes_the_place_of_the_recipes_value(self) -> None:
        made = recipe("methods.trsp.ratio=0.5", "evaluate.controls=[dense-trained]", "recover.enabled=true")
        (method,) = made.methods.chosen
        assert method.asked("layers") == 0.5
        assert (made.evaluate.controls, made.recover.enabled) == (("dense-trained",), True)

    def test_makes_the_sections_it_needs(self) -> None:
        assert recipe("regularize.objective.kl=2").regularize.objective == Objective(kl=2)

    def test_adds_a_text(self) -> None:
        made = recipe("evaluate.perplexity.web=web.parquet")
        assert made.evaluate.perplexity["web"].path == "web.parquet"

    def test_adds_a_method(self) -> None:
        made = recipe("methods.dress={ratio: 0.5, axes: [ffn, heads]}")
        assert [method.name for method in made.methods.chosen] == ["trsp", "dress"]

    def test_replaces_a_method_by_another(self) -> None:
        made = recipe("methods.trsp=null", "methods.sleb.ratio=0.5")
        assert [method.name for method in made.methods.chosen] == ["sleb"]

    def test_later_ones_win(self) -> None:
        (method,) = recipe("methods.trsp.ratio=0.5", "methods.trsp.ratio=0.75").methods.chosen
        assert method.asked("layers") == 0.75

    @pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001"])
    def test_reads_a_number_as_a_person_writes_it(self, written: str) -> None:
        assert recipe(f"regularize.learning_rate={written}").regularize.learning_rate == 1e-4

    def test_gives_no_value_back_to_the_default(self) -> None:
        assert recipe("evaluate.length=null", evaluate__length=64, calibration__length=32).evaluate.length == 32

    def test_of_an_unknown_field_is_refused_like_one_in_the_file(self) -> None:
        said = refusal("methods.trsp.ratoi=0.5")
        assert said == "the recipe's field 'methods.trsp.ratoi' is not known: did you mean 'ratio'?"

    @pytest.mark.parametrize("override", ["methods.trsp.ratio", "=0.5"])
    def test_without_a_key_or_a_value_is_refused(self, override: str) -> None:
        assert refusal(override) == f"--set {override!r} has no value: write --set dotted.key=value"

    def test_that_is_no_yaml_is_refused(self) -> None:
        assert refusal("evaluate.tasks=[piqa").endswith("which is not YAML: quote it")


class TestARecipeOfTheOlderForm:
    """Methods shared the sections target, gates and dress. It is refused by the sentence that says how it is written now."""

    @pytest.mark.parametrize(
        ("old", "now"),
        [
            (
                {"method": "trsp", "target": {"ratio": 0.25}},
                "replace method, target by methods: {trsp: {ratio: 0.25}}",
            ),
            (
                {"method": "trsp", "target": {"ratio": 0.25}, "gates": {"steps": 6, "shortlist": 0}},
                "replace method, target, gates by methods: {trsp: {ratio: 0.25, steps: 6, shortlist: 0}}",
            ),
            (
                {"method": "sleb", "target": {"ratio": 0.5}},
                "replace method, target by methods: {sleb: {ratio: 0.5}}",
            ),
            (
                {"method": "dress", "target": {"ratio": 0.5}, "dress": {"axes": ["ffn"], "ratio": None}},
                "replace method, target, dress by methods: {dress: {ratio: 0.5, axes: [ffn]}}",
            ),
            (
                {"method": ["trsp", "dress"], "target": {"ratio": 0.25}, "dress": {"ratio": 0.5}},
                "replace method, target, dress by methods: {trsp: {ratio: 0.25}, dress: {ratio: 0.5}}",
            ),
        ],
    )
    def test_is_refused_with_the_form_of_today(self, old: dict[str, Any], now: str) -> None:
        said = refusal(methods=None, **old)
        assert said == (
            f"the recipe's field 'method' is of an older form, in which methods shared their settings: {now}"
        )

    def test_is_refused_with_settings_that_are_taken(self) -> None:
        """The sentence's own cure is a recipe."""
        old = {
            "method": ["trsp", "dress"],
            "target": {"ratio": 0.25},
            "gates": {"steps": 6},
            "dress": {"axes": ["ffn"]},
        }
        cure = yaml.safe_load(refusal(methods=None, **old).partition(" by ")[2])
        assert [method.name for method in recipe(**cure).methods.chosen] == ["trsp", "dress"]

    def test_is_refused_if_only_an_override_has_it(self) -> None:
        said = refusal("target.ratio=0.5")
        assert said == (
            "the recipe's field 'target' is of an older form, in which methods shared their settings: "
            "replace target by methods: {trsp: {ratio: 0.5}}"
        )

    def test_is_refused_without_a_method_s_name(self) -> None:
        said = refusal(methods=None, target={"ratio": 0.25}, method=None)
        assert said.endswith("replace target by methods: {trsp: {ratio: 0.25}}")


class TestTheYaml:
    def test_gives_an_equal_recipe_back_and_says_no_more_than_was_set(self) -> None:
        made = recipe("regularize.learning_rate=3e-5", evaluate__controls=["pruned-first"])
        assert parse_recipe(made.to_yaml()) == made
        assert "recover" not in made.to_yaml()

    def test_keeps_the_method_that_was_named_and_no_other(self) -> None:
        made = recipe(methods={"sleb": {"ratio": 0.5}}).with_texts({"calibration.data": REFERENCE})
        assert yaml.safe_load(made.to_yaml())["methods"] == {"sleb": {"ratio": 0.5}}
        assert parse_recipe(made.to_yaml()) == made

    @pytest.mark.parametrize("text", ["", "just words", "- a\n- list", "42"])
    def test_that_is_no_mapping_is_refused(self, text: str) -> None:
        with pytest.raises(Refusal, match="is not a mapping of sections: start from one of the shipped recipes"):
            parse_recipe(text)

    def test_that_cannot_be_parsed_is_refused_in_one_line_that_says_where(self) -> None:
        with pytest.raises(Refusal, match=r"the recipe is not YAML: .*line 2") as refused:
            parse_recipe("regularize: {}\nmethods: {trsp: {ratio: 0.5")
        assert "\n" not in str(refused.value)


class TestTheFile:
    def test_is_read_with_its_overrides(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SMALLEST))
        (method,) = load_recipe(tmp_path / "recipe.yaml", ["methods.trsp.ratio=0.5"]).methods.chosen
        assert method.asked("layers") == 0.5

    def test_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            Refusal, match=r"cannot be read \(No such file or directory\): name a YAML file or a shipped"
        ):
            load_recipe(tmp_path / "recipe.yaml")

    def test_that_is_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(Refusal, match=r"cannot be read \(Is a directory\)"):
            load_recipe(tmp_path)

    def test_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(Refusal, match=r"cannot be read \(it is no text\)"):
            load_recipe(tmp_path / "model.safetensors")
