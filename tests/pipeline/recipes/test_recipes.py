"""The shipped recipes are whole, and say what they ship."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import pipeline
from components.lib.errors import Refusal
from components.lib.methods import known_methods
from components.lib.methods.dress import Dress
from components.lib.recipe.choices import ChosenMethods, ChosenTransfer
from components.lib.recipe.loading import load_recipe, parse_recipe
from components.lib.recipe.schema import Recipe, Text

RECIPES = sorted((Path(pipeline.__file__).parent / "recipes").glob("*.yaml"))
WHOLE = ["dress", "seam", "trsp"]
PEERS = [path for path in RECIPES if path.stem in ("laco", "last", "prunecomp", "random", "replaceme", "taylor")]
CHANNELS = {"flap": "fluctuation", "wanda": "wanda", "magnitude": "magnitude"}
"""The recipes of channels that dress is compared with, by their choice."""
BASELINES = [path for path in RECIPES if path.stem in ("sleb", "shortgpt")]


def settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def leaves(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no section, by its dotted name, with its default (`...` if it has none); the methods' left out."""
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, ChosenMethods):
            continue
        if isinstance(annotation, type) and issubclass(annotation, ChosenTransfer):
            yield f"{prefix}{name}", "none"
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and not issubclass(annotation, Text):
            yield from leaves(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ... if field.is_required() else field.default


def value(settings: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        settings = settings[part]
    return settings


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_named_after_its_method(path: Path) -> None:
    method = "dress" if path.stem in (*CHANNELS, "reap") else path.stem
    assert [chosen.name for chosen in load_recipe(path).methods.chosen] == [method]


def test_every_method_ships_a_recipe() -> None:
    assert {path.stem for path in RECIPES} >= set(known_methods())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_line_says_what_the_recipe_is(path: Path) -> None:
    """`espalier recipes` prints it."""
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def of(method: str) -> Iterator[tuple[str, Any]]:
    """Every field of the recipe of a method."""
    yield from leaves(known_methods()[method], f"methods.{method}.")
    yield from leaves(Recipe)


@pytest.mark.parametrize("method", WHOLE)
def test_a_whole_recipe_names_every_field_of_its_method(method: str) -> None:
    for name, _ in of(method):
        value(settings(RECIPES[0].with_stem(method)), name)


@pytest.mark.parametrize("method", WHOLE)
def test_a_whole_recipe_ships_the_defaults(method: str) -> None:
    """The recipe shows the value of a field that is left out. The rules of the verdict have none, and the transfer is the one that measured best."""
    shipped = settings(RECIPES[0].with_stem(method))
    assert shipped["regularize"]["transfer"] == "reconstruct"
    expected = {
        name: default
        for name, default in of(method)
        if default is not ... and name.split(".")[0] != "promote" and name != "regularize.transfer"
    }
    found = {name: value(shipped, name) for name in expected}
    assert {name: tuple(seen) if isinstance(seen, list) else seen for name, seen in found.items()} == expected


@pytest.mark.parametrize(("method", "other"), [("trsp", "dress"), ("dress", "trsp")])
def test_layers_and_channels_are_one_override_away(method: str, other: str) -> None:
    recipe = load_recipe(RECIPES[0].with_stem(method), [f"methods.{other}.ratio=0.25"])
    assert [chosen.name for chosen in recipe.methods.chosen] == ["trsp", "dress"]


@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.stem)
def test_a_peer_has_the_texts_and_the_training_of_trsp_and_its_own_transfer(path: Path) -> None:
    peer, trsp = load_recipe(path), load_recipe(RECIPES[0].with_stem("trsp"))
    own = {"laco": "merge", "prunecomp": "scale", "replaceme": "linear"}.get(path.stem)
    transfer = peer.regularize.transfer.chosen
    assert (transfer and transfer.name) == own
    assert peer.regularize.model_copy(update={"transfer": trsp.regularize.transfer}) == trsp.regularize
    assert (peer.calibration, peer.recover) == (trsp.calibration, trsp.recover)


@pytest.mark.parametrize(("name", "channels"), CHANNELS.items())
def test_a_peer_of_channels_is_dress_but_for_its_choice_and_its_transfer(name: str, channels: str) -> None:
    peer, dress = load_recipe(RECIPES[0].with_stem(name)), load_recipe(RECIPES[0].with_stem("dress"))
    assert peer.regularize.transfer.chosen is None
    same = peer.model_copy(
        update={
            "methods": load_recipe(RECIPES[0].with_stem(name), ["methods.dress.channels=activation"]).methods,
            "regularize": peer.regularize.model_copy(update={"transfer": dress.regularize.transfer}),
        }
    )
    assert same == dress
    assert [method.model_dump()["channels"] for method in peer.methods.chosen] == [channels]


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_regularises_nothing(path: Path) -> None:
    assert load_recipe(path).regularize.schedule == "none"


@pytest.mark.parametrize("path", BASELINES + PEERS, ids=lambda path: path.stem)
def test_a_baseline_names_every_setting_of_its_method(path: Path) -> None:
    assert settings(path)["methods"][path.stem].keys() == known_methods()[path.stem].model_fields.keys()


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
@pytest.mark.parametrize("section", ["calibration", "recover", "evaluate", "promote"])
def test_a_baseline_names_every_field_of_the_sections_it_uses(path: Path, section: str) -> None:
    shipped = settings(path)
    for name, _ in leaves(Recipe):
        if name.startswith(f"{section}."):
            value(shipped, name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_quality_is_reported_on_another_domain_too(path: Path) -> None:
    recipe = load_recipe(path)
    assert any(text.hub != recipe.calibration.data.hub for text in recipe.evaluate.perplexity.values())


def test_the_verdicts_of_the_shipped_recipes_compare() -> None:
    """One set of texts, and of rules of quality, or the methods could not be told apart; as fast as fewer layers narrow ones are not."""
    recipes = [load_recipe(path) for path in RECIPES]
    rules = [recipe.promote.model_dump()["rules"] for recipe in recipes]
    assert len({repr(recipe.evaluate) for recipe in recipes}) == 1
    assert (
        len({repr({name: rule for name, rule in one.items() if name not in ("prefill", "decode")}) for one in rules})
        == 1
    )
    assert len({repr(one) for one, recipe in zip(rules, recipes, strict=True) if recipe.removes_layers}) == 1


class TestChannelsOnTheCommandLine:
    """`--set` takes lists and mappings, and what is wrong in them is told in one sentence that names the field."""

    DRESS = RECIPES[0].with_stem("dress")

    @pytest.mark.parametrize(
        ("override", "ratios"),
        [
            ("methods.dress.axes=[ffn,hidden]", {"ffn": 0.25, "hidden": 0.25}),
            ("methods.dress.ratio=0.5", {"ffn": 0.5}),
            ("methods.dress.ratio={ffn: 0.5}", {"ffn": 0.5}),
            ("methods.dress.ratio.ffn=0.5", {"ffn": 0.5}),
            ("methods.dress={axes: [ffn, heads], ratio: {ffn: 0.5, heads: 0.25}}", {"ffn": 0.5, "heads": 0.25}),
        ],
    )
    def test_a_list_or_a_mapping_is_taken(self, override: str, ratios: dict[str, float]) -> None:
        recipe = load_recipe(self.DRESS, [override])
        (dress,) = recipe.methods.chosen
        assert isinstance(dress, Dress)
        assert dress.ratios == ratios
        assert parse_recipe(recipe.to_yaml()) == recipe

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            (
                "methods.dress.axes=ffn",
                "the recipe's field 'methods.dress.axes' is 'ffn': input should be a valid list",
            ),
            (
                "methods.dress.axes=[fnn]",
                "the recipe's field 'methods.dress.axes.0' is 'fnn': input should be 'hidden', 'ffn', 'heads' or 'experts'",
            ),
            (
                "methods.dress.ratio={ffn: 2}",
                "the recipe's field 'methods.dress.ratio.ffn' is 2: input should be less than 1",
            ),
            (
                "methods.dress.ratio={fnn: 0.5}",
                "the recipe's field 'methods.dress.ratio.fnn' is 'fnn': input should be 'hidden', 'ffn', 'heads' or 'experts'",
            ),
            (
                "methods.dress.ratio={ffn: 0.5, heads: 0.25}",
                "the recipe's methods.dress: ratio names ['ffn', 'heads'] and axes ['ffn']: name the same axes in both",
            ),
            (
                "methods.dress.channel=random",
                "the recipe's field 'methods.dress.channel' is not known: did you mean 'channels'?",
            ),
            (
                "methods.dress.shortlist=3",
                "the recipe's field 'methods.dress.shortlist' is not known: known there are axes, ratio, channels, multiple, batch_size, seed",
            ),
            (
                "methods.dress=null",
                "the recipe's methods: methods names none: name one of dress, laco, last, prunecomp, random, replaceme, seam, shortgpt, sleb, taylor, trsp",
            ),
        ],
    )
    def test_what_is_wrong_is_one_sentence_without_the_types_that_were_tried(self, override: str, said: str) -> None:
        with pytest.raises(Refusal, match=f"^{re.escape(said)}$"):
            load_recipe(self.DRESS, [override])
