"""The list of watched sources, and what is said of one that cannot be used."""

from pathlib import Path

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from components.watch.find import Watched
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


def sources_of(folder: Path, text: str) -> list[Watched]:
    (folder / "sources.yaml").write_text(text)
    return load_sources(folder / "sources.yaml", None, lambda name: folder / name)


def test_a_source_is_new_for_another_release_alone_unless_the_list_or_the_source_names_more(folder: Path) -> None:
    first, second = sources_of(
        folder,
        """
        recipe: recipe.yaml
        recompress_on: [release, recipe]
        sources:
          - {release: owner/a, name: a}
          - {release: owner/b, name: b, recompress_on: [code, release]}
        """,
    )
    assert (first.recompress_on, second.recompress_on) == (("release", "recipe"), ("release", "code"))
    (alone,) = sources_of(folder, "recipe: recipe.yaml\nsources: [{release: owner/a, name: a}]")
    assert alone.recompress_on == ("release",)


def test_a_policy_without_the_release_or_with_an_unknown_reason_is_refused(folder: Path) -> None:
    for policy, said in (("[recipe]", "always holds release"), ("[release, weather]", "recompress_on")):
        with pytest.raises(Refusal, match=said):
            sources_of(
                folder, f"recipe: recipe.yaml\nrecompress_on: {policy}\nsources: [{{release: owner/a, name: a}}]"
            )


def test_one_release_by_two_recipes_under_one_name_needs_the_recipe_in_the_policy(folder: Path) -> None:
    twice = """
        recipe: recipe.yaml
        POLICY
        sources:
          - {release: owner/a, name: a}
          - {release: owner/a, name: a, set: [methods.sleb.ratio=0.5]}
        """
    with pytest.raises(Refusal, match="names owner/a twice for a, with two recipes"):
        sources_of(folder, twice.replace("POLICY", ""))
    assert len(sources_of(folder, twice.replace("POLICY", "recompress_on: [release, recipe]"))) == 2


def test_a_source_of_the_command_line_may_name_more_reasons(folder: Path) -> None:
    (found,) = one_by_one(["owner/a"], "small", "recipe.yaml", [], lambda name: folder / name, ["code"])
    assert found.recompress_on == ("release", "code")
