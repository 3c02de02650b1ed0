"""What every method that chooses layers must hold to, and what each one minimises."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from components.lib.methods import Task, load
from components.lib.recipe.schema import Gates, Objective, Regularize, Target, methods
from components.lib.training.journal import Silent
from components.lib.training.regularize import regularize
from components.lib.transformer.gates import skipped, watched
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import Selection
from tests.components.lib.training.tiny import Written, chosen, counting, llama, same, weights

LAYERS = 6


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A model that counts, and whose layers 1 and 4 it can do without."""
    objective = Objective(lm=1, kl=0, state=0)
    settings = Regularize(
        steps=80, learning_rate=3e-3, precision="fp32", objective=objective, schedule="penalty", strength=1.0, ramp=0.1
    )
    return regularize(llama(LAYERS), None, counting(), chosen(1, 4), settings)


def task(count: int, **gates: Any) -> Task:
    return Task(Target(ratio=count / LAYERS), Gates(batch_size=8, **gates))


def choose(model: LlamaForCausalLM, method: str, count: int, **gates: Any) -> Selection:
    return load(method)(model, counting(), task(count, **gates), journal=Silent(), out=None)


def cost(model: LlamaForCausalLM, layers: tuple[int, ...]) -> float:
    with skipped(model, layers):
        return perplexity(model, counting())


@pytest.mark.parametrize("method", [method for method in methods() if method != "dress"])
class TestEveryMethodOfLayers:
    @pytest.mark.parametrize("count", [1, 3, LAYERS - 1])
    def test_chooses_as_many_layers_as_asked(self, model: LlamaForCausalLM, method: str, count: int) -> None:
        selection = choose(model, method, count, steps=2)
        assert len(set(selection.removed)) == count
        assert selection.removed == tuple(sorted(selection.order))
        assert set(selection.removed) <= set(range(LAYERS))
        assert selection.method == method
        assert all(len(scores) == LAYERS for scores in selection.scores.values())

    def test_finds_the_layers_that_can_go(self, model: LlamaForCausalLM, method: str) -> None:
        assert choose(model, method, 2).removed == (1, 4)

    def test_leaves_the_model_as_it_was(self, model: LlamaForCausalLM, method: str) -> None:
        before, logits = weights(model), model(input_ids=counting()).logits
        choose(model, method, 2, steps=2)
        assert same(weights(model), before)
        assert torch.equal(model(input_ids=counting()).logits, logits)

    def test_chooses_the_same_again(self, model: LlamaForCausalLM, method: str) -> None:
        assert choose(model, method, 3, steps=2) == choose(model, method, 3, steps=2)

    def test_tells_its_progress_to_the_end(self, model: LlamaForCausalLM, method: str) -> None:
        journal = Written()
        load(method)(model, counting(), task(2, steps=2), journal=journal, out=None)
        done, total = zip(*journal.done, strict=True)
        assert list(done) == sorted(set(done))
        assert done[-1] == total[-1]
        assert len(set(total)) == 1


def test_an_unknown_method_is_none_of_ours() -> None:
    with pytest.raises(ModuleNotFoundError):
        load("none-such")


class TestSleb:
    def test_takes_the_cheapest_layer_of_all_each_round(self, model: LlamaForCausalLM) -> None:
        first, second = choose(model, "sleb", 2).order
        assert cost(model, (first,)) == min(cost(model, (layer,)) for layer in range(LAYERS))
        assert cost(model, (first, second)) == min(
            cost(model, (first, other)) for other in range(LAYERS) if other != first
        )


class TestShortGPT:
    def test_takes_the_layers_of_smallest_block_influence(self, model: LlamaForCausalLM) -> None:
        selection = choose(model, "shortgpt", 2)
        with watched(model, range(LAYERS)) as seen, torch.no_grad():
            model(input_ids=counting())
            expected = [1 - torch.cosine_similarity(*seen[layer], dim=-1).mean().item() for layer in range(LAYERS)]
        assert selection.scores["block_influence"] == pytest.approx(expected, abs=1e-5)
        assert list(selection.order) == sorted(range(LAYERS), key=expected.__getitem__)[:2]


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

    def test_leaves_where_the_gates_have_been(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        selection = load("trsp")(model, counting(), task(2, steps=3), journal=Silent(), out=tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "trajectory.jsonl").read_text().splitlines()]
        assert [(line["round"], line["step"]) for line in lines] == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6)]
        assert all(line["gates"][selection.order[0]] == 0 for line in lines[3:])
        assert lines[2]["gates"][selection.order[0]] == pytest.approx(selection.scores["gate"][selection.order[0]])
        assert "<svg" in (tmp_path / "gates.svg").read_text()
