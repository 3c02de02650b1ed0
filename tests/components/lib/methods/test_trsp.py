"""TRSP's choice of layers: its gates name a shortlist, and measurements decide."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from components.lib.errors import Refusal
from components.lib.methods.trsp import Trsp
from components.lib.training.seam import divergence_after_fit, parted, record
from components.lib.transformer.checkpoint import PrunableCheckpoint
from tests.components.lib.methods.layers import LAYERS, choose, cost
from tests.components.lib.training.tiny import counting
from tests.components.lib.transformer.zoo import SPECIMENS, release


class TestTrsp:
    @pytest.mark.parametrize("strategy", ["iterative", "one-shot"])
    @pytest.mark.parametrize("placement", ["branch", "output"])
    def test_every_strategy_and_placement_chooses_near_the_best(
        self, model: LlamaForCausalLM, strategy: str, placement: str
    ) -> None:
        selection = choose(model, "trsp", 2, strategy=strategy, placement=placement)
        best = min(cost(model, pair) for pair in itertools.combinations(range(LAYERS), 2))
        assert cost(model, selection.removed) < 1.05 * best

    def test_a_shortlist_of_every_layer_is_a_greedy_search(self, model: LlamaForCausalLM) -> None:
        assert choose(model, "trsp", 3, shortlist=LAYERS, steps=1).order == choose(model, "sleb", 3).order

    def test_without_a_shortlist_the_smallest_gate_goes(self, model: LlamaForCausalLM) -> None:
        selection = choose(model, "trsp", 2, strategy="one-shot", shortlist=0)
        assert list(selection.order) == sorted(range(LAYERS), key=selection.scores["gate"].__getitem__)[:2]
        assert set(selection.scores["perplexity"]) == {0.0}

    def test_fitted_measures_each_removal_behind_the_transfer(self, model: LlamaForCausalLM) -> None:
        selection = choose(model, "trsp", 2, shortlist=LAYERS, steps=1, measure="fitted")
        dense = record(model, *parted(counting()))

        def divergence(*layers: int) -> float:
            return divergence_after_fit(model, dense, sorted(layers), strength=0.1)

        first, second = selection.order
        assert first == min(range(LAYERS), key=divergence)
        left = [layer for layer in range(LAYERS) if layer != first]
        assert second == min(left, key=lambda layer: divergence(first, layer))
        assert selection.scores["divergence"][second] == pytest.approx(divergence(first, second), rel=1e-3)
        assert "perplexity" not in selection.scores

    def test_fitted_refuses_a_family_that_no_transfer_can_be_fitted_to(self, tmp_path: Path) -> None:
        gemma = next(specimen for specimen in SPECIMENS if specimen.model_type == "gemma2")
        checkpoint = PrunableCheckpoint.open(release(gemma.model(4), tmp_path))
        Trsp(ratio=0.25).check(checkpoint)
        with pytest.raises(Refusal, match=r"methods.trsp.measure is fitted, but Gemma 2 has norms between .*: use cut"):
            Trsp(ratio=0.25, measure="fitted").check(checkpoint)

    def test_leaves_where_the_gates_have_been(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        selection = choose(model, "trsp", 2, out=tmp_path, steps=3)
        lines = [json.loads(line) for line in (tmp_path / "trajectory.jsonl").read_text().splitlines()]
        assert [(line["round"], line["step"]) for line in lines] == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6)]
        assert all(line["gates"][selection.order[0]] == 0 for line in lines[3:])
        assert lines[2]["gates"][selection.order[0]] == pytest.approx(selection.scores["gate"][selection.order[0]])
        assert "<svg" in (tmp_path / "gates.svg").read_text()
