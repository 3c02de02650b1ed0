"""A recipe's fault is one sentence: the field, its value and the cure."""

from __future__ import annotations

from typing import Any

import pytest

from tests.components.lib.recipe.smallest import refusal


class TestAMissingField:
    @pytest.mark.parametrize("field", ["methods", "calibration", "evaluate"])
    def test_is_named(self, field: str) -> None:
        assert refusal(**{field: None}).startswith(f"the recipe's field '{field}' is missing: add it (")

    def test_is_told_with_what_it_is_for(self) -> None:
        assert "The text the windows are drawn from" in refusal(calibration__data=None)

    @pytest.mark.parametrize("method", ["trsp", "sleb", "shortgpt", "dress"])
    def test_of_a_method_is_named_with_it(self, method: str) -> None:
        said = refusal(methods={method: {}})
        assert said.startswith(f"the recipe's field 'methods.{method}.ratio' is missing: add it (The part of ")


class TestAnUnknownField:
    def test_is_refused_with_the_nearest_known_one(self) -> None:
        assert refusal(regularise={}) == "the recipe's field 'regularise' is not known: did you mean 'regularize'?"

    @pytest.mark.parametrize(
        ("method", "field", "nearest"),
        [
            ("trsp", "ratoi", "ratio"),
            ("trsp", "short_list", "shortlist"),
            ("sleb", "batchsize", "batch_size"),
            ("dress", "chanels", "channels"),
        ],
    )
    def test_of_a_method_is_refused_with_the_nearest_of_that_method(
        self, method: str, field: str, nearest: str
    ) -> None:
        said = refusal(methods={method: {"ratio": 0.5, field: 1}})
        assert said == f"the recipe's field 'methods.{method}.{field}' is not known: did you mean '{nearest}'?"

    def test_of_a_method_is_not_told_with_the_field_of_another(self) -> None:
        """`shortlist` is TRSP's."""
        said = refusal(methods={"sleb": {"ratio": 0.5, "shortlist": 4}})
        assert said == ("the recipe's field 'methods.sleb.shortlist' is not known: known there are ratio, batch_size")

    def test_is_refused_with_all_known_ones_if_none_is_near(self) -> None:
        said = refusal(evaluate__speed__zzz=1)
        assert said.startswith(
            "the recipe's field 'evaluate.speed.zzz' is not known: known there are enabled, backend,"
        )

    def test_is_found_inside_a_named_text(self) -> None:
        said = refusal(evaluate__perplexity={"test": {"path": "x.txt", "feild": "body"}})
        assert said == "the recipe's field 'evaluate.perplexity.test.feild' is not known: did you mean 'field'?"

    def test_is_told_with_how_many_more_faults_there_are(self) -> None:
        assert refusal(methods__trsp__ratoi=0.5, recover__stpes=1).endswith("(and 1 more)")

    def test_is_a_method_that_is_not_there(self) -> None:
        said = refusal(methods={"tsrp": {"ratio": 0.25}})
        assert said == "the recipe's field 'methods.tsrp' is not known: did you mean 'trsp'?"

    def test_is_a_transfer_that_is_not_there(self) -> None:
        assert refusal(regularize__transfer="nosuch").startswith(
            "the recipe's field 'regularize.transfer.nosuch' is not known"
        )


class TestAValueThatIsNotAllowed:
    @pytest.mark.parametrize("ratio", [0, 1, -0.25, 1.5, float("nan")])
    @pytest.mark.parametrize("method", ["trsp", "dress"])
    def test_is_a_ratio_that_removes_nothing_or_everything(self, method: str, ratio: float) -> None:
        said = refusal(methods={method: {"ratio": ratio}})
        assert said.startswith(f"the recipe's field 'methods.{method}.ratio' is {ratio!r}: ")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("calibration__samples", 0),
            ("calibration__length", 7),
            ("methods__trsp__strategy", "twice"),
            ("methods__trsp__strength", float("inf")),
            ("methods__trsp__batch_size", 0),
            ("regularize__learning_rate", 0),
            ("regularize__anneal", 1.0),
            ("regularize__steps", 1.5),
            ("evaluate__perplexity", {}),
            ("evaluate__controls", ["pruned-last"]),
            ("promote__rules__quality", {"figure": "perplexity", "bound": float("nan"), "why": "w"}),
            ("recover__enabled", "perhaps"),
        ],
    )
    def test_is_named_with_its_field(self, field: str, value: Any) -> None:
        dotted = field.replace("__", ".")
        assert refusal(**{field: value}).startswith(f"the recipe's field '{dotted}")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("axes", []),
            ("axes", ["width"]),
            ("ratio", 1.0),
            ("ratio", {"ffn": 1.5}),
            ("ratio", {"width": 0.5}),
            ("channels", "largest"),
            ("multiple", 0),
        ],
    )
    def test_of_dress_is_named_with_its_field(self, field: str, value: Any) -> None:
        said = refusal(methods={"dress": {"ratio": 0.5, field: value}})
        assert said.startswith(f"the recipe's field 'methods.dress.{field}")

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
