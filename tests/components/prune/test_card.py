"""The model card tells what was removed, from what, and what was checked; its head is what the Hub reads."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import yaml

from components.lib.report_parts import Lines, Sentence, Table
from components.lib.transformer.layout import Widths
from components.lib.transformer.selection import Channels, Selection
from components.prune import card as module
from components.prune.card import front_matter, model_card

RELEASE = {"source": "org/base@main", "revision": "0123456789" * 4, "digest": "sha256:" + "ab" * 32}
SELECTION = Selection(
    method="sleb", removed=(1, 3), order=(3, 1), scores={"perplexity": (90.0, 12.5, 0.0, 11.25), "short": (1.0,)}
)
VERIFICATION = {"removed": [1, 3], "layers": 2, "parameters": 8599296, "dtype": "bfloat16", "max_difference": 3.1e-6}
WIDTHS = Widths(hidden=64, ffn=1024, heads=8, groups=4, head=8)
CHANNELS = Selection(method="dress", channels=Channels(ffn=(tuple(range(264)),) * 2, heads=((3,),) * 2))
BOTH = SELECTION.model_copy(update={"method": "trsp+dress", "channels": Channels(ffn=(tuple(range(264)),) * 4)})
RECIPE = {"methods": {"sleb": {"ratio": 0.5}}}


def card(**changed: Any) -> str:
    given = {
        "release": RELEASE,
        "recipe": RECIPE,
        "selection": SELECTION,
        "widths": WIDTHS,
        "verification": VERIFICATION,
    }
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
    assert "2 of 4 layers were removed by `sleb`" in card()
    assert "Layers 3, 1 of the release, in this order" in card()


def test_channels_are_told_axis_by_axis_and_counted() -> None:
    told = card(selection=CHANNELS)
    assert "`org/base@main` without 264 of 1,024 ffn channels a layer and 1 of 4 key-value groups a layer" in told
    assert "| ffn | 1,024 | 760 | 25.8 % |\n| heads | 4 | 3 | 25 % |" in told
    assert "cut from, those channels gated to 0." in told
    assert "layer of the release" not in told
    assert "261" not in told
    assert front_matter(told)["tags"] == ["pruned", "ffn-pruning", "head-pruning", "dress"]


def test_layers_and_channels_are_told_together() -> None:
    told = card(selection=BOTH)
    assert "2 of 4 layers and 264 of 1,024 ffn channels a layer were removed by `trsp` and `dress`" in told
    assert "| ffn | 1,024 | 760 | 25.8 % |" in told
    assert "| 3 | removed | 11.25 |" in told
    assert "those layers skipped and those channels gated to 0." in told
    assert front_matter(told)["tags"] == ["pruned", "layer-pruning", "ffn-pruning", "trsp", "dress"]


def test_the_parts_that_methods_add_are_written_and_pictures_left_out() -> None:
    table = Table(["layer", "score"], [["0", "a|b"], ["1", "2"]], title="Scores", note="Low is little needed.")
    picture = Lines(x="step", y="gate", lines=[], summary="Gates of 4 layers")
    told = card(parts=[Sentence("The channels are <drawn> at\nrandom."), picture, table])
    assert "\nThe channels are \\<drawn\\> at random.\n" in told
    assert "\n**Scores**\n\n| layer | score |\n|---|---|\n| 0 | a\\|b |\n| 1 | 2 |\n\nLow is little needed.\n" in told
    assert "gate" not in told.partition("## What was removed")[2].partition("## Lineage")[0]


def test_the_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(module)
    assert (found.attempted, found.failed) == (2, 0)


def test_lineage_verification_and_recipe_are_told() -> None:
    told = card()
    assert all(f"`{value}`" in told for value in RELEASE.values())
    assert "| max difference | 3.1e-06 |" in told
    assert "| parameters | 8,599,296 |" in told
    assert yaml.safe_load(told.split("```yaml\n")[1].split("```")[0]) == RECIPE


def test_the_channels_that_were_verified_are_told_by_axis() -> None:
    channels = {"ffn": {"before": 1024, "after": 760, "removed": 264}, "heads": {"before": 4, "after": 3, "removed": 1}}
    told = card(selection=CHANNELS, verification=VERIFICATION | {"channels": channels}).split("## Verification")[1]
    assert "| ffn channels a layer | 760 of 1,024, 264 removed |" in told
    assert "| key-value groups a layer | 3 of 4, 1 removed |" in told
    assert "| channels |" not in told


def test_a_hostile_source_stays_in_its_code_span() -> None:
    told = card(release={**RELEASE, "source": "a`b|c\n---\nlicense: mit"})
    assert "`a'b/c --- license: mit`" in told
    assert "license" not in front_matter(told)


def test_a_release_that_was_dequantised_is_told() -> None:
    assert "stored in FP8. They were dequantised to bf16" in card(release={**RELEASE, "dequantised": "fp8"})
    assert "dequantised" not in card()


def test_a_release_that_is_a_gguf_file_is_told() -> None:
    told = card(release={**RELEASE, "source": "org/base/Q4/model.gguf", "gguf": "Q4_K, Q6_K"})
    assert "The release is a GGUF file with weights in Q4_K, Q6_K. transformers made a plain checkpoint" in told
    assert front_matter(told)["base_model"] == "org/base"
    assert "GGUF" not in card()


def test_one_layer_is_not_told_as_several() -> None:
    one = Selection(method="sleb", removed=(1,), order=(1,))
    assert "\nLayer 1 of the release.\n" in card(selection=one, verification={**VERIFICATION, "removed": [1]})
    assert "\nLayers 3, 1 of the release, in this order.\n" in card()


def test_a_wrapper_is_loaded_by_its_own_class() -> None:
    """The class for text does not load every wrapper, and the processor makes tokens of an image."""
    told = card(wraps=True)
    assert "AutoModelForImageTextToText.from_pretrained(PATH" in told
    assert "AutoProcessor.from_pretrained(PATH)" in told
    assert "AutoModelForCausalLM" not in told
    assert front_matter(told)["pipeline_tag"] == "image-text-to-text"
    assert "how well it\nanswers about images was not measured" in told
    assert "AutoModelForCausalLM.from_pretrained(PATH" in card()
    assert "images" not in card()


def test_a_text_model_that_was_taken_out_of_a_wrapper_is_told() -> None:
    told = card(release={**RELEASE, "taken_out_of": "Qwen3.5"})
    assert "The release is a Qwen3.5, which takes images too. This model is made from its text model alone" in told
    assert "AutoModelForCausalLM.from_pretrained(PATH" in told


def test_experts_are_told_by_the_layer() -> None:
    experts = Selection(method="dress", channels=Channels(experts=((), (0, 2))))
    told = card(selection=experts, widths=Widths(32, 48, 4, 2, 8, experts=8))
    assert "2 of 8 experts a layer" in told
    assert "those experts gated to 0" in told
