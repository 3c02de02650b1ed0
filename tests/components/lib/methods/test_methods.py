"""What every method that chooses layers must hold to, and what each one minimises."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from components.lib.errors import Refusal
from components.lib.methods import LayerMethod, known_methods
from components.lib.methods.shortgpt import block_influence
from components.lib.training.journal import Silent
from components.lib.transfers.scale import Scale
from components.lib.transformer.checkpoint import PrunableCheckpoint
from components.lib.transformer.gates import bypassed, watched
from components.lib.transformer.removal import Removal
from components.lib.transformer.selection import Selection
from tests.components.lib.methods.layers import LAYERS, OF_LAYERS, choose, cost
from tests.components.lib.training.tiny import Written, counting, same, weights
from tests.components.lib.transformer.wrapped import WRAPPED
from tests.components.lib.transformer.zoo import SPECIMENS, release

BLIND = ("last", "random")
"""Methods that look at nothing."""


def of_layers(name: str, ratio: float) -> LayerMethod:
    """A method of layers with its ratio."""
    made = known_methods()[name](ratio=ratio)
    assert isinstance(made, LayerMethod)
    return made


@pytest.mark.parametrize("method", OF_LAYERS)
class TestEveryMethodOfLayers:
    @pytest.mark.parametrize("count", [1, 3, LAYERS - 1])
    def test_chooses_as_many_layers_as_asked(self, model: LlamaForCausalLM, method: str, count: int) -> None:
        selection = choose(model, method, count, steps=2)
        assert len(set(selection.removed)) == count
        assert selection.removed == tuple(sorted(selection.order))
        assert set(selection.removed) <= set(range(LAYERS))
        assert selection.method == method
        assert all(len(scores) == LAYERS for scores in selection.scores.values())

    def test_leaves_the_model_as_it_was(self, model: LlamaForCausalLM, method: str) -> None:
        before, logits = weights(model), model(input_ids=counting()).logits
        choose(model, method, 2, steps=2)
        assert same(weights(model), before)
        assert torch.equal(model(input_ids=counting()).logits, logits)

    def test_chooses_the_same_again(self, model: LlamaForCausalLM, method: str) -> None:
        assert choose(model, method, 3, steps=2) == choose(model, method, 3, steps=2)

    @pytest.mark.parametrize(
        ("ratio", "layers", "count"), [(0.25, 12, 3), (0.5, 5, 3), (0.2, 32, 6), (0.21, 32, 7), (0.01, 12, 1)]
    )
    def test_rounds_its_ratio_to_whole_layers_and_at_least_one(
        self, method: str, ratio: float, layers: int, count: int
    ) -> None:
        assert of_layers(method, ratio).count(layers) == count

    @pytest.mark.parametrize(("ratio", "layers"), [(0.99, 12), (0.5, 1), (0.75, 2)])
    def test_refuses_a_ratio_that_leaves_no_layer(self, method: str, ratio: float, layers: int) -> None:
        with pytest.raises(
            Refusal, match=rf"methods\.{method}\.ratio {ratio} removes {layers} of the model's {layers}"
        ):
            of_layers(method, ratio).count(layers)

    def test_refuses_the_checkpoint_before_the_work(self, method: str, tmp_path: Path) -> None:
        release(SPECIMENS[0].model(layers=4), tmp_path)
        checkpoint = PrunableCheckpoint.open(tmp_path)
        of_layers(method, 0.75).check(checkpoint)
        with pytest.raises(Refusal, match=rf"methods\.{method}\.ratio 0\.9 removes 4 of the model's 4 layers"):
            of_layers(method, 0.9).check(checkpoint)

    def test_tells_the_part_it_was_asked_for_and_why_another_was_removed(self, method: str) -> None:
        made = of_layers(method, 0.3)
        assert (made.asked("layers"), made.asked("ffn")) == (0.3, None)
        assert made.rounding(Removal("layers", 12, 8)) == "rounded to whole layers"

    def test_explains_the_scores_that_it_leaves(self, model: LlamaForCausalLM, method: str) -> None:
        assert choose(model, method, 1, steps=2).scores.keys() <= known_methods()[method].scores.keys()


@pytest.fixture(scope="module")
def with_fixed_layers() -> PreTrainedModel:
    """A model of whose six layers the first two cannot be removed."""
    return next(wrapped for wrapped in WRAPPED if wrapped.model_type == "qwen3_vl").model(LAYERS)


@pytest.mark.parametrize("method", OF_LAYERS)
def test_layers_that_cannot_be_removed_are_not_chosen(with_fixed_layers: PreTrainedModel, method: str) -> None:
    found = choose(with_fixed_layers, method, 3, steps=2)  # type: ignore[arg-type]
    assert len(found.removed) == 3
    assert set(found.removed) <= {2, 3, 4, 5}


@pytest.mark.parametrize("method", OF_LAYERS)
def test_more_than_can_be_removed_is_refused_before_the_work(
    with_fixed_layers: PreTrainedModel, method: str, tmp_path: Path
) -> None:
    checkpoint = PrunableCheckpoint.open(release(with_fixed_layers, tmp_path))
    with pytest.raises(Refusal, match=r"removes 4 layers, but of Qwen3-VL at most 3 of 6 can be removed"):
        of_layers(method, 4 / 6).check(checkpoint)


@pytest.mark.parametrize("method", ["prunecomp", "seam", "shortgpt", "sleb", "trsp"])
def test_a_method_that_measures_single_layers_finds_those_that_can_go(model: LlamaForCausalLM, method: str) -> None:
    assert choose(model, method, 2).removed == (1, 4)


@pytest.mark.parametrize("method", [name for name in OF_LAYERS if name not in BLIND])
def test_a_method_that_measures_tells_its_progress_to_the_end(model: LlamaForCausalLM, method: str) -> None:
    journal = Written()
    choose(model, method, 2, journal=journal, steps=2)
    done, total = zip(*journal.done, strict=True)
    assert list(done) == sorted(set(done))
    assert done[-1] == total[-1]
    assert len(set(total)) == 1


@pytest.mark.parametrize("name", known_methods())
def test_a_method_s_name_is_its_file_s_and_its_settings_are_documented(name: str) -> None:
    kind = known_methods()[name]
    assert kind.__module__ == f"components.lib.methods.{name}"
    assert kind.title
    assert all(field.description for field in kind.model_fields.values())


@pytest.mark.parametrize("name", [name for name in known_methods() if name not in BLIND])
def test_a_method_that_measures_has_a_batch_size_of_its_own(name: str) -> None:
    assert known_methods()[name](ratio=0.5).model_dump()["batch_size"] == 8
    assert known_methods()[name](ratio=0.5, batch_size=2).model_dump()["batch_size"] == 2


def test_settings_are_read_without_torch() -> None:
    """A recipe is checked on a laptop in the time of a keystroke."""
    said = "import sys, components.lib.recipe.schema; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", said], check=True)


class TestSleb:
    def test_takes_the_cheapest_layer_of_all_each_round(self, model: LlamaForCausalLM) -> None:
        first, second = choose(model, "sleb", 2).order
        assert cost(model, (first,)) == min(cost(model, (layer,)) for layer in range(LAYERS))
        assert cost(model, (first, second)) == min(
            cost(model, (first, other)) for other in range(LAYERS) if other != first
        )

    def test_measures_in_batches_of_its_own_size(self, model: LlamaForCausalLM) -> None:
        one, other = (choose(model, "sleb", 2, batch_size=size) for size in (5, 8))
        assert one.order == other.order
        assert one.scores["perplexity"] == pytest.approx(other.scores["perplexity"], rel=1e-5)


class TestShortGPT:
    def test_takes_the_layers_of_smallest_block_influence(self, model: LlamaForCausalLM) -> None:
        selection = choose(model, "shortgpt", 2)
        with watched(model, range(LAYERS)) as seen, torch.no_grad():
            model(input_ids=counting())
            expected = [1 - torch.cosine_similarity(*seen[layer], dim=-1).mean().item() for layer in range(LAYERS)]
        assert selection.scores["block_influence"] == pytest.approx(expected, abs=1e-5)
        assert list(selection.order) == sorted(range(LAYERS), key=expected.__getitem__)[:2]

    def test_measures_in_batches_of_its_own_size(self, model: LlamaForCausalLM) -> None:
        """And tells its progress by them."""
        journal = Written()
        selection = choose(model, "shortgpt", 2, journal=journal, batch_size=12)
        assert [done for done, _ in journal.done] == [12, 24]
        assert selection.order == choose(model, "shortgpt", 2).order


class TestPruneComp:
    def test_the_first_round_is_shortgpt_s(self, model: LlamaForCausalLM) -> None:
        one, other = choose(model, "prunecomp", 1), choose(model, "shortgpt", 1)
        assert (one.order, one.scores) == (other.order, other.scores)

    def test_the_next_round_measures_with_the_magnitude_of_the_removed_layer(self, model: LlamaForCausalLM) -> None:
        selection = choose(model, "prunecomp", 2)
        first = selection.order[0]
        Scale().apply(compensated := deepcopy(model), counting(), Selection.of_layers("", [first]), journal=Silent())
        with bypassed(compensated, [first]):
            left = [layer for layer in range(LAYERS) if layer != first]
            expected = block_influence(compensated, counting(), left, 8)
        found = {layer: selection.scores["block_influence"][layer] for layer in left}
        # Weights that are multiplied stand for a factor on the stream, up to the ε of the norms.
        assert found == pytest.approx(expected, abs=2e-4)


class TestReplaceMe:
    @pytest.mark.parametrize("count", [1, 2, LAYERS - 1])
    def test_takes_the_run_of_smallest_cosine_distance(self, model: LlamaForCausalLM, count: int) -> None:
        with watched(model, range(LAYERS)) as seen, torch.no_grad():
            model(input_ids=counting())
            cosine = [
                torch.cosine_similarity(seen[first][0], seen[first + count - 1][1], dim=-1).mean().item()
                for first in range(1, LAYERS - count + 1)
            ]
        best = 1 + cosine.index(max(cosine))
        selection = choose(model, "replaceme", count)
        assert selection.removed == tuple(range(best, best + count))
        distances = selection.scores["cosine_distance"]
        assert distances[best] == pytest.approx(1 - max(cosine), abs=1e-5)
        assert distances[0] == pytest.approx(1 - min(cosine), abs=1e-5)


class TestTaylor:
    def test_scores_a_layer_by_its_weights_times_the_gradient(self, model: LlamaForCausalLM) -> None:
        selection = choose(model, "taylor", 2, first=0, last=0, batch_size=3)
        free = deepcopy(model).requires_grad_(True)
        logits = free(input_ids=counting()[:10]).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), counting()[:10, 1:].flatten()).backward()
        expected = [sum((w * w.grad).abs().sum().item() for w in layer.parameters()) for layer in free.model.layers]
        assert selection.scores["taylor"] == pytest.approx(expected, rel=1e-3)
        assert list(selection.order) == sorted(range(LAYERS), key=expected.__getitem__)[:2]

    def test_guards_the_first_and_the_last_layers_while_others_are_left(self, model: LlamaForCausalLM) -> None:
        assert set(choose(model, "taylor", 2, first=2, last=2).removed) == {2, 3}
        assert {2, 3} < set(choose(model, "taylor", 3, first=2, last=2).removed)

    def test_leaves_no_gradient_and_what_required_one(self, model: LlamaForCausalLM) -> None:
        frozen = deepcopy(model)
        frozen.model.embed_tokens.requires_grad_(False)
        before = {name: parameter.requires_grad for name, parameter in frozen.named_parameters()}
        choose(frozen, "taylor", 1)
        assert {name: parameter.requires_grad for name, parameter in frozen.named_parameters()} == before
        assert all(parameter.grad is None for parameter in frozen.parameters())


class TestBlind:
    @pytest.mark.parametrize(("count", "order"), [(1, (4,)), (3, (4, 3, 2)), (LAYERS - 1, (4, 3, 2, 1, 0))])
    def test_last_removes_the_deepest_layers_but_the_very_last(
        self, model: LlamaForCausalLM, count: int, order: tuple[int, ...]
    ) -> None:
        assert choose(model, "last", count).order == order

    def test_random_follows_its_seed_and_draws_every_layer(self, model: LlamaForCausalLM) -> None:
        drawn = {choose(model, "random", 1, seed=seed).removed for seed in range(40)}
        assert drawn == {(layer,) for layer in range(LAYERS)}
        # A larger ratio keeps the layers of a smaller one.
        assert choose(model, "random", 4, seed=3).order[:2] == choose(model, "random", 2, seed=3).order
