"""The contract over drawn shapes: family × layers × removed layers × head grouping × tying × dtype."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as draw
from transformers import AutoModelForCausalLM, PreTrainedModel

from components.transformer.checkpoint import Checkpoint
from components.transformer.export import save_model
from components.transformer.families import FAMILIES
from components.transformer.gates import gated, skipped
from components.transformer.surgery import cut_checkpoint, drop_layers
from tests.components.transformer.zoo import SPECIMENS, Specimen, logits, prompts

CASES = 300
PARTS = 4


class Case(NamedTuple):
    specimen: Specimen
    layers: int
    removed: tuple[int, ...]
    heads: int
    key_value_heads: int
    tied: bool
    dtype: torch.dtype


@draw.composite
def cases(take: draw.DrawFn) -> Case:
    layers = take(draw.integers(2, 6))
    removed = take(draw.sets(draw.integers(0, layers - 1), min_size=1, max_size=layers - 1))
    heads = take(draw.sampled_from([1, 2, 4]))
    return Case(
        specimen=take(draw.sampled_from(SPECIMENS)),
        layers=layers,
        removed=tuple(sorted(removed)),
        heads=heads,
        key_value_heads=take(draw.sampled_from([count for count in (1, 2, 4) if heads % count == 0])),
        tied=take(draw.booleans()),
        dtype=take(draw.sampled_from([torch.float32, torch.bfloat16])),
    )


def test_the_specimens_show_every_family() -> None:
    assert {specimen.model_type for specimen in SPECIMENS} == set(FAMILIES)


@pytest.mark.parametrize("part", range(PARTS))
def test_gates_skips_cuts_and_exports_agree(part: int) -> None:
    """In parts, so that parallel runs share them; each has its own fixed seed."""

    @seed(part)
    @settings(max_examples=CASES // PARTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def agree(case: Case) -> None:
        with TemporaryDirectory() as folder:
            hold(case, Path(folder))

    agree()


def hold(case: Case, folder: Path) -> None:
    """Hold one drawn case to the contract: every way of removing the layers gives one and the same model."""
    model = case.specimen.model(case.layers, case.heads, case.key_value_heads, case.tied, case.dtype)
    model.save_pretrained(folder / "source")

    dense = logits(model)
    with gated(model, torch.ones(case.layers)):
        assert torch.equal(logits(model), dense)
    with skipped(model, case.removed):
        expected = logits(model)

    cut_checkpoint(folder / "source", folder / "cut", case.removed)
    cut = assert_is(folder / "cut", expected, case)
    if case.dtype == torch.float32:  # in bf16 another order of summation is visible
        assert_decodes_as_it_reads(cut)
    save_model(drop_layers(model, case.removed), folder / "source", folder / "saved", removed=case.removed)
    assert torch.equal(logits(model), expected)
    assert_is(folder / "saved", expected, case)


def assert_is(folder: Path, expected: torch.Tensor, case: Case) -> PreTrainedModel:
    """A stranger's plain load has no tensor too few or too many, and these logits; return it."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.dtype == case.dtype
    assert torch.equal(logits(model.eval()), expected)
    assert Checkpoint.open(folder).layers == case.layers - len(case.removed)
    return model


@torch.no_grad()
def assert_decodes_as_it_reads(model: PreTrainedModel, read: int = 16) -> None:
    """Feeding a prompt in two parts through the cache gives the logits of feeding it whole."""
    tokens, _ = prompts(padding=(0, 0))
    whole = model(input_ids=tokens).logits[:, read:]
    cache = model(input_ids=tokens[:, :read], use_cache=True).past_key_values
    for position in range(read, tokens.shape[1]):
        step = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(step.logits[:, 0], whole[:, position - read], rtol=1e-3, atol=1e-4)
