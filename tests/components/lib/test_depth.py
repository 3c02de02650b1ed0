"""The depths that a search tries, and what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.lib.depth import STEPS, Point, Search, depths, in_words
from components.lib.errors import Refusal
from components.lib.methods.dress import Dress
from components.lib.methods.sleb import Sleb
from components.lib.transformer.checkpoint import PrunableCheckpoint
from tests.components.lib.transformer import zoo


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> PrunableCheckpoint:
    release = zoo.release(zoo.Specimen("llama", "llama").model(layers=8), tmp_path_factory.mktemp("release"))
    return PrunableCheckpoint.open(release)


class TestTheDepths:
    def test_of_layers_are_one_for_each_layer_up_to_the_ratio(self, checkpoint: PrunableCheckpoint) -> None:
        found = depths([Sleb(ratio=0.5)], checkpoint)
        assert [depth.methods[0].count(8) for depth in found] == [1, 2, 3, 4]
        assert found[0].ratios == {"sleb": 0.125}
        assert found[-1].part == 1.0

    def test_of_channels_are_parts_of_every_axis_that_the_model_can_have(self, checkpoint: PrunableCheckpoint) -> None:
        found = depths([Dress(ratio={"ffn": 0.5, "hidden": 0.25}, axes=("ffn", "hidden"))], checkpoint)
        assert len(found) <= STEPS
        assert found[-1].ratios == {"dress": {"ffn": 0.5, "hidden": 0.25}}
        for depth in found:
            depth.methods[0].check(checkpoint)

    def test_of_two_methods_scale_both(self, checkpoint: PrunableCheckpoint) -> None:
        found = depths([Sleb(ratio=0.5), Dress(ratio=0.5)], checkpoint)
        assert all(depth.ratios == {"sleb": 0.5 * depth.part, "dress": 0.5 * depth.part} for depth in found)

    def test_that_the_model_allows_none_of_are_refused(self, checkpoint: PrunableCheckpoint) -> None:
        with pytest.raises(Refusal, match="of the 2 channels of the axis heads no number near"):
            depths([Dress(ratio=0.1, axes=("heads",))], checkpoint)


class TestTheRecord:
    POINT = Point(part=0.5, ratios={"trsp": 0.125}, value=1.1, holds=True)

    def test_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        search = Search(field="max_perplexity_ratio", bound=1.2, points=(self.POINT,), part=0.5, next=None)
        search.save(tmp_path)
        assert Search.load(tmp_path) == search
        assert search.chosen == self.POINT

    def test_is_none_if_nothing_was_searched(self, tmp_path: Path) -> None:
        assert Search.load(tmp_path) is None

    def test_names_ratios_as_a_recipe_does(self) -> None:
        assert (
            in_words({"trsp": 0.125, "dress": {"ffn": 0.5}})
            == "methods.trsp.ratio 0.125, methods.dress.ratio {'ffn': 0.5}"
        )
