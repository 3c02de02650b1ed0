"""LaCo's choice: its order, its criterion, and that it measures what the transfer merge makes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from components.lib.methods.laco import work
from components.lib.training.journal import Silent
from components.lib.transfers.merge import Merge
from components.lib.transformer.gates import bypassed, final_state
from components.lib.transformer.selection import Selection
from tests.components.lib.methods.layers import LAYERS, choose
from tests.components.lib.training.tiny import counting


@torch.no_grad()
def states(model: LlamaForCausalLM, *removed: int) -> Tensor:
    """The final states of the first ten windows, with the removed layers merged."""
    changed = deepcopy(model)
    Merge().apply(changed, counting(), Selection.of_layers("", removed), journal=Silent())
    with bypassed(changed, removed), final_state(changed) as state:
        changed(input_ids=counting()[:10])
        assert state.value is not None
        return state.value


def similarity(model: LlamaForCausalLM, *removed: int) -> float:
    return torch.cosine_similarity(states(model).flatten(1), states(model, *removed).flatten(1)).mean().item()


class TestSearch:
    def test_goes_from_the_last_layers_to_the_first(self, model: LlamaForCausalLM) -> None:
        """At a threshold that every merge passes: C − 1 layers, then C − 1 others I below, then what is missing."""
        assert choose(model, "laco", 1, threshold=-1).order == (3,)
        assert choose(model, "laco", 4, threshold=-1, merged=3, interval=2).order == (4, 5, 2, 3)

    def test_a_score_is_the_distance_that_the_transfer_leaves(self, model: LlamaForCausalLM) -> None:
        selection = choose(model, "laco", 2, merged=3, threshold=-1)
        assert selection.order == (4, 5)
        found = selection.scores["distance"]
        assert found[4] == found[5] == pytest.approx(1 - similarity(model, 4, 5), abs=1e-5)

    def test_a_threshold_that_nothing_passes_falls_to_the_most_similar_merge(self, model: LlamaForCausalLM) -> None:
        selection = choose(model, "laco", 1, threshold=1.0, merged=2)
        every = {layer: similarity(model, layer) for layer in range(1, LAYERS)}
        assert selection.order == (max(every, key=every.__getitem__),)

    def test_a_merge_that_holds_a_merged_layer_is_measured_as_the_transfer_makes_it(
        self, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = list[float]()

        def kept(one: Tensor, other: Tensor) -> float:
            seen.append(torch.cosine_similarity(one.flatten(1), other.flatten(1)).mean().item())
            return 1.0

        monkeypatch.setattr(work, "_similarity", kept)
        assert choose(model, "laco", 4, merged=3).order == (4, 5, 2, 3)
        assert seen == pytest.approx([similarity(model, 4, 5), similarity(model, 2, 3, 4, 5)], abs=1e-5)

    def test_a_state_that_is_no_number_is_not_similar(self) -> None:
        assert work._similarity(torch.ones(2, 3, 4), torch.full((2, 3, 4), torch.nan)) == -1
