"""The choice of runs: their costs are those of the cut model with its seam fitted, and the cheapest sets are the cheapest of all."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.training.journal import Silent
from components.lib.training.refit import runs_of
from components.lib.training.seam import (
    CORRUPTED,
    Recorded,
    Run,
    cheapest_sets,
    choose_runs,
    corrupted,
    divergence_after_fit,
    far_apart,
    record,
    runs_with_costs,
)
from components.lib.transfers.ridge import Ridge
from components.lib.transformer.gates import bypassed
from components.lib.transformer.selection import Selection
from tests.components.lib.transformer.zoo import SPECIMENS, VOCABULARY, counted

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}
LAYERS = 6


def windows(count: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(seed))


FITTED, PROBED = windows(24, 0), windows(3, 1)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel) -> Tensor:
    return model(input_ids=PROBED).logits[:, 1:].log_softmax(-1)


def divergence(model: PreTrainedModel, *removed: int) -> float:
    """KL(dense ‖ cut) after the transfer ridge, computed straight away."""
    dense = log_probabilities(model)
    Ridge(strength=0.1).apply(model, FITTED, Selection(method="hand", removed=removed), journal=Silent())
    with bypassed(model, removed):
        cut = log_probabilities(model)
    return (dense.exp() * (dense - cut)).sum(-1).mean().item()


@pytest.mark.parametrize("name", ["llama", "granite", "gpt2", "opt"])
def test_a_run_costs_what_its_removal_costs_after_the_transfer(name: str) -> None:
    """Streams are injected and layers shared, and the result is that of the cut model."""
    model = BY_NAME[name].model(LAYERS)
    before = log_probabilities(model)
    dense = record(model, FITTED, PROBED)
    runs = {(run.first, run.last): run for run in runs_with_costs(model, dense, longest=3, strength=0.1)}
    assert torch.equal(log_probabilities(model), before)
    assert set(runs) == {(first, last) for first in range(1, LAYERS) for last in range(first, min(first + 3, LAYERS))}
    for first, last in [(1, 1), (2, 4), (4, 5)]:
        found = BY_NAME[name].model(LAYERS)
        # The first tokens differ: an injected stream has their fitted state too, so that they agree as well.
        assert runs[first, last].divergence == pytest.approx(divergence(found, *range(first, last + 1)), rel=1e-3)


def test_the_cost_of_a_set_is_that_of_its_removal_after_the_transfer_and_leaves_the_model() -> None:
    model = BY_NAME["llama"].model(LAYERS)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    dense = record(model, FITTED, PROBED)
    for removed in ((1, 2, 4), (3, 5)):
        found = divergence_after_fit(model, dense, removed, 0.1)
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        assert found == pytest.approx(divergence(BY_NAME["llama"].model(LAYERS), *removed), rel=1e-3)


def test_the_layers_below_the_first_seam_are_never_computed_again() -> None:
    model = BY_NAME["llama"].model(LAYERS)
    dense = record(model, FITTED, PROBED)
    with counted(model) as calls:
        divergence_after_fit(model, dense, (4,), 0.1)
    assert calls[:3] == [0, 0, 0]
    assert calls[3] > 0
    with counted(model) as calls:
        runs_with_costs(model, dense, longest=2, strength=0.1)
    # Of each layer but the last: two passes for the scale of its branch. Of those above a run: one, for the run's cost.
    behind = [sum(last < layer for first in range(1, LAYERS) for last in (first, first + 1)) for layer in range(LAYERS)]
    assert calls == [2 + behind[layer] for layer in range(LAYERS - 1)] + [behind[-1]]


def test_a_shortlist_holds_no_two_sets_that_are_nearly_the_same() -> None:
    near, far = (3, 4, 5, 6, 7, 9), (3, 4, 5, 6, 12, 13)
    assert far_apart([(3, 4, 5, 6, 7, 8), near, far, (3, 4, 5, 6, 12, 14), (20, 21, 22, 23, 24, 25)], keep=3) == [
        (3, 4, 5, 6, 7, 8),
        far,
        (20, 21, 22, 23, 24, 25),
    ]
    assert far_apart([(3, 4), (5, 6), (7, 8)], keep=2) == [(3, 4), (5, 6)]


def test_the_cheapest_sets_are_the_cheapest_of_all() -> None:
    draw = torch.Generator().manual_seed(0)
    runs = [
        Run(first, last, torch.rand((), generator=draw).item() * (last - first + 1), 0.0)
        for first in range(1, 9)
        for last in range(first, min(first + 3, 9))
    ]
    cost = {(run.first, run.last): run.divergence for run in runs}
    every = [chosen for chosen in combinations(range(1, 9), 4) if all(run in cost for run in runs_of(chosen))]
    expected = sorted(every, key=lambda chosen: sum(cost[run] for run in runs_of(chosen)))
    assert cheapest_sets(runs, 9, 4, keep=5) == expected[:5]


def test_runs_are_chosen_around_a_layer_that_is_needed() -> None:
    """Layer 3 alone does much: the others' branches are almost 0."""
    model = BY_NAME["llama"].model(LAYERS)
    for layer in (1, 2, 4, 5):
        for projection in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
            projection.weight.data *= 1e-3
    chosen, runs = choose_runs(model, torch.cat([FITTED, PROBED]), count=4, journal=Silent())
    assert chosen == (1, 2, 4, 5)
    assert all(run.divergence > 0.01 for run in runs if run.first <= 3 <= run.last)


def test_in_a_quarter_of_the_windows_to_measure_on_some_tokens_come_unexpectedly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[Tensor] = []

    def seen(model: PreTrainedModel, fitted: Tensor, probed: Tensor, batch_size: int) -> Recorded:
        measured.append(probed)
        return record(model, fitted, probed, batch_size)

    monkeypatch.setattr("components.lib.training.seam.record", seen)
    drawn = windows(16, 2)
    choose_runs(BY_NAME["llama"].model(LAYERS), drawn, count=1, journal=Silent(), measure_tokens=4 * 16)
    assert torch.equal(measured[0], torch.cat([drawn[-4:-1], corrupted(drawn[-1:], drawn)]))


def test_corrupted_windows_keep_their_first_tokens_and_hold_no_token_that_the_tokenizer_never_made() -> None:
    text = torch.randint(3, 40, (64, 128), generator=torch.Generator().manual_seed(1))
    found = corrupted(text[:8], text)
    assert torch.equal(found[:, 0], text[:8, 0])
    assert set(found.unique().tolist()) <= set(text.unique().tolist())
    # A replaced token may be the same one again.
    assert (found != text[:8]).float().mean().item() == pytest.approx(CORRUPTED, abs=0.05)
    assert torch.equal(found, corrupted(text[:8], text))
