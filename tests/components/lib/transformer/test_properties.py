"""The contract over drawn shapes: family × layers × removed layers × head grouping × tying × dtype."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, reject, seed, settings
from hypothesis import strategies as draw
from transformers import AutoModelForCausalLM, PreTrainedModel

from components.lib.errors import Refusal
from components.lib.transformer.channels import FAR
from components.lib.transformer.checkpoint import Checkpoint
from components.lib.transformer.export import save_model
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.gates import gated, skipped
from components.lib.transformer.layout import Axis
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import AXES
from components.lib.transformer.surgery import cut_checkpoint, drop_layers
from tests.components.lib.transformer.zoo import (
    MODERN,
    NARROWABLE,
    SPECIMENS,
    Specimen,
    draw_channels,
    logits,
    prompts,
    widths_of,
)

CASES = 300
PARTS = 4
CHANNEL_CASES = 60


class Case(NamedTuple):
    specimen: Specimen
    layers: int
    removed: tuple[int, ...]
    heads: int
    key_value_heads: int
    tied: bool
    dtype: torch.dtype


class ChannelCase(NamedTuple):
    specimen: Specimen
    layers: int
    removed: tuple[int, ...]
    heads: int
    key_value_heads: int
    tied: bool
    dtype: torch.dtype
    ratios: dict[Axis, float]
    seed: int


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


@draw.composite
def channel_cases(take: draw.DrawFn) -> ChannelCase:
    layers = take(draw.integers(1, 4))
    heads = take(draw.sampled_from([2, 4, 8]))
    ratio, axes = take(draw.floats(0.1, 0.8)), take(draw.sets(draw.sampled_from(AXES), min_size=1))
    return ChannelCase(
        specimen=take(draw.sampled_from(NARROWABLE)),
        layers=layers,
        removed=tuple(sorted(take(draw.sets(draw.integers(0, layers - 1), max_size=layers - 1)))),
        heads=heads,
        key_value_heads=take(draw.sampled_from([count for count in (2, 4, 8) if heads % count == 0])),
        tied=take(draw.booleans()),
        dtype=take(draw.sampled_from([torch.float32, torch.bfloat16])),
        ratios=dict.fromkeys(sorted(axes), ratio),
        seed=take(draw.integers(0, 2**16)),
    )


def test_the_specimens_show_every_family() -> None:
    of_the_full_contract = {specimen.model_type for specimen in SPECIMENS}
    assert of_the_full_contract | {specimen.model_type for specimen in MODERN} == set(FAMILIES)
    assert {specimen.model_type for specimen in NARROWABLE} == {
        model_type for model_type in of_the_full_contract if FAMILIES[model_type].layout
    }


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


def test_channel_gates_cuts_and_exports_agree() -> None:
    @seed(0)
    @settings(max_examples=CHANNEL_CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(channel_cases())
    def agree(case: ChannelCase) -> None:
        with TemporaryDirectory() as folder:
            hold_channels(case, Path(folder))

    agree()


def hold_channels(case: ChannelCase, folder: Path) -> None:
    """Hold one drawn case to the contract: what is removed is near what was asked for, and every way of removing it is one model."""
    model = case.specimen.model(case.layers, case.heads, case.key_value_heads, case.tied, case.dtype)
    try:
        channels = draw_channels(model, ratios=case.ratios, seed=case.seed)
    except Refusal:  # no width that the model can have is near the ratio (test_channels.py)
        reject()
    for axis, ratio in case.ratios.items():
        assert abs(channels.count(axis) / widths_of(model).of(axis) - ratio) <= FAR

    dense = logits(model)
    with narrowed(model, channels, gate=1.0):
        assert torch.equal(logits(model), dense)
    with narrowed(model, channels), skipped(model, case.removed):
        expected = logits(model)

    model.save_pretrained(folder / "source")
    cut_checkpoint(folder / "source", folder / "cut", case.removed, channels)
    cut, loading = AutoModelForCausalLM.from_pretrained(folder / "cut", output_loading_info=True)
    assert not any(loading.values()), loading
    assert cut.dtype == case.dtype
    rounding = 1e-5 if case.dtype == torch.float32 else 0.1
    assert (logits(cut.eval()) - expected).abs().max() < rounding * expected.abs().max()


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
