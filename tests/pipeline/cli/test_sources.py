"""The list of watched sources, and what is said of one that cannot be used."""

from pathlib import Path

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from pipeline.cli.sources import load_sources, one_by_one

RECIPE = """
methods: {sleb: {ratio: 0.25}}
calibration: {data: {hub: owner/text}}
regularize: {schedule: none}
evaluate: {perplexity: {text: {hub: owner/text}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "half.yaml").write_text(RECIPE.replace("0.25", "0.5"))
    return tmp_path


def listed(folder: Path, text: str) -> Path:
    path = folder / "sources.yaml"
    path.write_text(text)
    return path


def ratios(path: Path, recipe: str | None = None) -> dict[str, float]:
    return {
        one.release: parse_recipe(one.recipe).methods.chosen[0].asked("layers")
        for one in load_sources(path, recipe, lambda name: Path(name))
    }


def test_recipes_lie_beside_the_list_and_a_source_may_have_its_own(folder: Path) -> None:
    path = listed(
        folder,
        """
        recipe: recipe.yaml
        sources:
          - {release: owner/a, name: a}
          - {release: owner/b, name: b, recipe: half.yaml}
          - {release: owner/c, name: c, set: [methods.sleb.ratio=0.75]}
        """,
    )
    assert ratios(path) == {"owner/a": 0.25, "owner/b": 0.5, "owner/c": 0.75}


def test_the_command_lines_recipe_is_for_sources_that_have_none(folder: Path) -> None:
    path = listed(folder, "sources: [{release: owner/a, name: a}, {release: owner/b, name: b, recipe: half.yaml}]")
    assert ratios(path, str(folder / "recipe.yaml")) == {"owner/a": 0.25, "owner/b": 0.5}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sources: []", "wrong at sources"),
        ("sources: [{release: owner/a}]", "wrong at sources.0.name"),
        ("sources: [{release: owner/a, name: a, nmae: b}]", "wrong at sources.0.nmae"),
        ("- owner/a", "wrong at its top level"),
        ("sources: [", "is not YAML"),
        ("sources: [{release: owner/a, name: a}]", "the source owner/a has no recipe: add 'recipe'"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(folder: Path, text: str, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        ratios(listed(folder, text))


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"nowhere\.yaml cannot be read"):
        ratios(tmp_path / "nowhere.yaml")


def test_sources_of_the_command_line_share_name_and_recipe(folder: Path) -> None:
    found = one_by_one(
        ["owner/a", "owner/b"], "small", "recipe.yaml", ["methods.sleb.ratio=0.5"], lambda name: folder / name
    )
    assert [(one.release, one.name) for one in found] == [("owner/a", "small"), ("owner/b", "small")]
    assert parse_recipe(found[0].recipe).methods.chosen[0].asked("layers") == 0.5


@pytest.mark.parametrize(("name", "recipe", "missing"), [(None, "recipe.yaml", "--name"), ("small", None, "--recipe")])
def test_a_source_of_the_command_line_needs_both(name: str | None, recipe: str | None, missing: str) -> None:
    with pytest.raises(Refusal, match=f"has no {missing}"):
        one_by_one(["owner/a"], name, recipe, [], Path)
