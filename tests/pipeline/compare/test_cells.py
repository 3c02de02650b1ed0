"""Which recipes a comparison runs: the ratio and the seeds set, and what does not compare refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from pipeline.compare.cells import cells, load_recipes

RECIPE = """
methods: METHODS
calibration: {data: text.txt, samples: 2, length: 8}
evaluate: {perplexity: {one: text.txt}}
"""
TRSP, SLEB, BOTH = "{trsp: {ratio: 0.25}}", "{sleb: {ratio: 0.25}}", "{trsp: {ratio: 0.25}, dress: {ratio: {ffn: 0.5}}}"


def recipe(methods: str) -> Recipe:
    return parse_recipe(RECIPE.replace("METHODS", methods))


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str], str]:
    def written(name: str, methods: str, more: str = "") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(RECIPE.replace("METHODS", methods) + more)
        return str(tmp_path / name)

    return written


class TestCells:
    def test_are_every_recipe_with_every_ratio_and_seed_the_first_seed_of_all_first(self) -> None:
        made = cells({"one": recipe(TRSP), "two": recipe(SLEB)}, [0.25, 0.5], [0, 1])
        assert [(cell.name, cell.ratio, cell.seed) for cell in made] == [
            (name, ratio, seed) for seed in (0, 1) for ratio in (0.25, 0.5) for name in ("one", "two")
        ]

    def test_have_the_ratio_in_every_method(self) -> None:
        (made,) = cells({"both": recipe(BOTH)}, [0.5], [])
        assert [method.ratio for method in made.recipe.methods.chosen] == [0.5, 0.5]  # type: ignore[attr-defined]

    def test_have_the_seed_in_every_section_that_draws(self) -> None:
        (made,) = cells({"both": recipe(BOTH)}, [], [7])
        settings = made.recipe
        trsp, dress = settings.methods.chosen
        drawn = (trsp, dress, settings.calibration, settings.regularize, settings.recover)
        assert [section.seed for section in drawn] == [7] * 5  # type: ignore[attr-defined]

    def test_without_ratios_and_seeds_are_the_recipes_themselves(self) -> None:
        (made,) = cells({"one": recipe(BOTH)}, [], [])
        assert (made.ratio, made.seed, made.recipe) == (None, None, recipe(BOTH))

    def test_of_equal_ratios_are_one(self) -> None:
        assert len(cells({"one": recipe(TRSP)}, [0.5, 0.5], [1, 1])) == 1

    def test_with_a_ratio_that_no_recipe_allows_are_refused(self) -> None:
        with pytest.raises(Refusal, match=r"methods\.trsp\.ratio' is 1\.5"):
            cells({"one": recipe(TRSP)}, [1.5], [])


class TestTheRecipes:
    def test_are_named_by_their_files_and_take_the_overrides(self, written: Callable[..., str]) -> None:
        found = load_recipes([written("a.yaml", TRSP), written("b.yaml", SLEB)], ["calibration.samples=4"])
        assert list(found) == ["a", "b"]
        assert [one.calibration.samples for one in found.values()] == [4, 4]

    def test_take_an_override_of_a_method_if_they_name_it(self, written: Callable[..., str]) -> None:
        found = load_recipes([written("a.yaml", TRSP), written("b.yaml", SLEB)], ["methods.trsp.steps=3"])
        assert found["a"].methods.chosen[0].steps == 3  # type: ignore[attr-defined]
        assert [method.name for method in found["b"].methods.chosen] == ["sleb"]

    def test_none_of_which_names_an_overrides_method_are_refused(self, written: Callable[..., str]) -> None:
        with pytest.raises(Refusal, match=r"--set methods\.dress\.ratio=0\.5: no recipe .* names the method dress"):
            load_recipes([written("a.yaml", TRSP)], ["methods.dress.ratio=0.5"])

    def test_of_one_name_are_refused(self, written: Callable[..., str]) -> None:
        with pytest.raises(Refusal, match="two recipes are called a: rename"):
            load_recipes([written("a.yaml", TRSP), written("x/a.yaml", SLEB)], [])

    def test_that_measure_differently_are_refused(self, written: Callable[..., str]) -> None:
        other = written("b.yaml", SLEB).replace("b.yaml", "c.yaml")
        Path(other).write_text(RECIPE.replace("METHODS", SLEB).replace("length: 8", "length: 16"))
        with pytest.raises(Refusal, match=r"different values of evaluate\.length"):
            load_recipes([written("a.yaml", TRSP), other], [])
        assert load_recipes([written("a.yaml", TRSP), other], ["evaluate.length=8"])
