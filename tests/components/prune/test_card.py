"""The model card tells what was removed, from what, and what was checked; its head is what the Hub reads."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from components.prune.card import front_matter, model_card
from components.transformer.selection import Selection

RELEASE = {"source": "org/base@main", "revision": "0123456789" * 4, "digest": "sha256:" + "ab" * 32}
SELECTION = Selection(
    method="sleb", removed=(1, 3), order=(3, 1), scores={"perplexity": (90.0, 12.5, 0.0, 11.25), "short": (1.0,)}
)
VERIFICATION = {"removed": [1, 3], "layers": 2, "parameters": 8599296, "dtype": "bfloat16", "max_difference": 3.1e-6}
RECIPE = {"method": "sleb", "target": {"ratio": 0.5}}


def card(**changed: Any) -> str:
    given = {"release": RELEASE, "recipe": RECIPE, "selection": SELECTION, "verification": VERIFICATION}
    return model_card(**(given | changed))


def test_the_head_is_yaml_that_the_hub_understands() -> None:
    assert front_matter(card()) == {
        "base_model": "org/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "layer-pruning", "sleb"],
    }


def test_licence_and_language_are_carried_from_the_release() -> None:
    release_card = "---\nlicense: other\nlicense_name: llama3\nlanguage: [en]\nthumbnail: x.png\n---\n# Base\n"
    head = front_matter(card(release_card=release_card))
    assert (head["license"], head["license_name"], head["language"]) == ("other", "llama3", ["en"])
    assert "thumbnail" not in head


@pytest.mark.parametrize(("source", "revision"), [("models/base", "folder"), ("s3://b/base", "0" * 64), ("a/b", None)])
def test_a_release_that_is_not_of_the_hub_is_no_base_model(source: str, revision: str | None) -> None:
    assert "base_model" not in front_matter(card(release={**RELEASE, "source": source, "revision": revision}))


@pytest.mark.parametrize("text", ["", "# no head", "---\n: [\n---\n", "---\njust text\n---\n", "---\nlicense: mit\n"])
def test_a_release_card_without_a_readable_head_carries_nothing(text: str) -> None:
    assert front_matter(text) == {}


def test_each_layer_is_told_with_its_new_place_and_its_score() -> None:
    rows = [line for line in card().splitlines() if line[:3] in ("| 0", "| 1", "| 2", "| 3")]
    assert rows == ["| 0 | 0 | 90 |", "| 1 | removed | 12.5 |", "| 2 | 1 | – |", "| 3 | removed | 11.25 |"]
    assert "2 of its 4 layers were removed by `sleb`" in card()
    assert "Layers 3, 1 of the release, in this order" in card()


def test_lineage_verification_and_recipe_are_told() -> None:
    told = card()
    assert all(f"`{value}`" in told for value in RELEASE.values())
    assert "| max difference | 3.1e-06 |" in told
    assert "| parameters | 8,599,296 |" in told
    assert yaml.safe_load(told.split("```yaml\n")[1].split("```")[0]) == RECIPE


def test_a_hostile_source_stays_in_its_code_span() -> None:
    told = card(release={**RELEASE, "source": "a`b|c\n---\nlicense: mit"})
    assert "`a'b/c --- license: mit`" in told
    assert "license" not in front_matter(told)
