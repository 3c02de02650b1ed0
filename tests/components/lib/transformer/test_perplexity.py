"""Perplexity is exp of the mean negative log-likelihood of every token but a window's first."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from components.lib.transformer import perplexity as module
from components.lib.transformer.gates import bypassed
from components.lib.transformer.perplexity import negative_log_likelihood, perplexities_without, perplexity
from tests.components.lib.transformer.zoo import MODERN, SPECIMENS, VOCABULARY, Specimen, counted

LLAMA = next(specimen for specimen in SPECIMENS if specimen.name == "llama")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return LLAMA.model(layers=2)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


def by_hand(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """The definition, one token at a time, in fp64."""
    total, count = 0.0, 0
    for window in windows:
        for t in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :t]).logits[0, -1].double()
            total -= logits.log_softmax(0)[window[t]].item()
            count += 1
    return math.exp(total / count)


def test_is_the_definition(model: PreTrainedModel, windows: torch.Tensor) -> None:
    assert perplexity(model, windows) == pytest.approx(by_hand(model, windows), rel=1e-5)


def test_is_transformers_own_loss_on_equal_windows(model: PreTrainedModel, windows: torch.Tensor) -> None:
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert perplexity(model, windows) == pytest.approx(math.exp(loss), rel=1e-5)


def test_counts_every_token_but_the_first_of_a_window(model: PreTrainedModel, windows: torch.Tensor) -> None:
    nll, tokens = negative_log_likelihood(model, windows)
    assert tokens == 5 * 11
    assert perplexity(model, windows) == math.exp(nll / tokens)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_does_not_depend_on_the_batch(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> None:
    assert perplexity(model, windows, batch_size) == pytest.approx(perplexity(model, windows), rel=1e-6)


def test_does_not_depend_on_how_the_logits_are_split(
    model: PreTrainedModel, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, windows)
    batches: list[int] = []
    monkeypatch.setitem(module.RAISED, "cpu", 7 * VOCABULARY)
    monkeypatch.setattr(module, "LOGITS", 2 * 12 * VOCABULARY)
    assert perplexity(model, windows, batch_size=5, done=batches.append) == pytest.approx(whole, rel=1e-6)
    assert batches == [24, 24, 12]  # two windows at most, though five were allowed


def test_one_window_is_read_however_large_the_vocabulary(
    model: PreTrainedModel, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, windows)
    monkeypatch.setitem(module.RAISED, "cpu", 1)
    monkeypatch.setattr(module, "LOGITS", 1)
    assert perplexity(model, windows) == pytest.approx(whole, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary(windows: torch.Tensor) -> None:
    model = LLAMA.model(layers=2)
    model.get_output_embeddings().weight.data.zero_()
    assert perplexity(model, windows) == pytest.approx(VOCABULARY, rel=1e-6)


def test_bf16_logits_are_summed_up_in_fp32(windows: torch.Tensor) -> None:
    """In bf16 a loss near ln 96 = 4.56 has steps of 0.03: the mean would be visibly off."""
    model = LLAMA.model(layers=2, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].double()
    exact = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).mean().item()
    assert perplexity(model, windows) == pytest.approx(math.exp(exact), rel=1e-5)


def test_int32_windows_are_taken_as_they_are_stored(model: PreTrainedModel, windows: torch.Tensor) -> None:
    assert perplexity(model, windows.int()) == perplexity(model, windows)


def test_nan_stays_nan(windows: torch.Tensor) -> None:
    model = LLAMA.model(layers=2)
    model.get_input_embeddings().weight.data[windows[3, 4]] = math.nan  # one token in one window is enough
    assert math.isnan(perplexity(model, windows, batch_size=2))


def test_what_no_float_holds_is_infinite(windows: torch.Tensor) -> None:
    model = LLAMA.model(layers=2)
    model.get_output_embeddings().weight.data.mul_(1e6)
    assert perplexity(model, windows) == math.inf


def test_leaves_the_model_as_it_was(windows: torch.Tensor) -> None:
    model = LLAMA.model(layers=2).train()
    perplexity(model, windows)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(0, 8), (4, 1), (8,)])
def test_windows_that_predict_nothing_are_an_error(model: PreTrainedModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"windows must be \(N >= 1, L >= 2\)"):
        perplexity(model, torch.zeros(shape, dtype=torch.long))


class TestWithoutOneMore:
    """Of each candidate: the perplexity with it bypassed, at the cost of the layers above it."""

    @pytest.mark.parametrize("specimen", [*SPECIMENS, *MODERN], ids=str)
    def test_is_bit_for_bit_the_perplexity_with_the_layers_bypassed(self, specimen: Specimen) -> None:
        model = specimen.model(layers=6)
        windows = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))
        found = perplexities_without(model, windows, [2], [0, 1, 3, 5], batch_size=2)
        for layer, value in found.items():
            with bypassed(model, [2, layer]):
                assert value == perplexity(model, windows, batch_size=2)
        assert list(found) == [0, 1, 3, 5]

    def test_computes_the_layers_below_a_candidate_once_for_all(self, windows: torch.Tensor) -> None:
        model = LLAMA.model(layers=6)
        with counted(model) as calls:
            perplexities_without(model, windows, [2], [0, 1, 3, 4, 5], batch_size=5)
        # Once for all below layer 5, and for each candidate above it; layer 2 is removed.
        assert calls == [1, 1 + 1, 0, 1 + 2, 1 + 3, 0 + 4]

    def test_says_how_far_it_is(self, model: PreTrainedModel, windows: torch.Tensor) -> None:
        read = list[int]()
        perplexities_without(model, windows, [], [0, 1], batch_size=2, done=read.append)
        assert read == [24, 24, 12]
