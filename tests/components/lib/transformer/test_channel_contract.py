"""The contract that every family of which channels can be cut is held to, on a tiny random model of each of its shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from components.lib.transformer.channels import layout_of
from components.lib.transformer.checkpoint import PrunableCheckpoint, load_model
from components.lib.transformer.export import verify_cut
from components.lib.transformer.gates import skipped
from components.lib.transformer.layout import Axis, Widths
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.selection import AXES, Channels
from components.lib.transformer.surgery import cut_checkpoint
from tests.components.lib.transformer.zoo import (
    FFN_ONLY,
    NARROWABLE,
    Specimen,
    draw_channels,
    logits,
    release,
    widths_of,
)

LAYERS = 3
REMOVED = (1,)


@pytest.fixture(scope="module", params=NARROWABLE, ids=str)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    return request.param


def reloaded(folder: Path) -> PreTrainedModel:
    """Load as a stranger would, and let nothing pass that transformers only warns of."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of summation."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("axis", AXES)
def test_a_gate_of_zero_is_the_cut(source: Path, dense: PreTrainedModel, axis: Axis, tmp_path: Path) -> None:
    channels = draw_channels(dense, (axis,))
    with narrowed(dense, channels):
        expected = logits(dense)
    assert (expected - logits(dense)).abs().max() > 0.1
    cut_checkpoint(source, tmp_path, channels=channels)
    assert_close(logits(reloaded(tmp_path)), expected)
    assert_widths(source, tmp_path, channels)


def test_layers_and_channels_go_together_and_the_export_is_verified(
    source: Path, dense: PreTrainedModel, tmp_path: Path
) -> None:
    """Along all axes; logits and cached generation, by `verify_cut`, and by hand against the gates."""
    channels = draw_channels(dense)
    with narrowed(dense, channels), skipped(dense, REMOVED):
        expected = logits(dense)
    cut_checkpoint(source, tmp_path, REMOVED, channels)
    verification = verify_cut(source, tmp_path, REMOVED, channels)
    assert verification.max_difference < 1e-5 * expected.abs().max()
    assert verification.cache_difference < 1e-5
    assert verification.layers == LAYERS - len(REMOVED)
    assert_close(logits(reloaded(tmp_path)), expected)


@pytest.mark.parametrize("specimen", FFN_ONLY, ids=str, scope="function")
def test_what_lies_beside_the_layout_leaves_ffn_to_be_cut(specimen: Specimen, tmp_path: Path) -> None:
    """An embedding that is projected into the stream, and norms of single heads; with layers, and by `verify_cut` too."""
    source = release(specimen.model(LAYERS), tmp_path / "source")
    dense = load_model(source)
    channels = draw_channels(dense, ("ffn",))
    with narrowed(dense, channels), skipped(dense, REMOVED):
        expected = logits(dense)
    cut_checkpoint(source, tmp_path / "cut", REMOVED, channels)
    verify_cut(source, tmp_path / "cut", REMOVED, channels)
    assert_close(logits(reloaded(tmp_path / "cut")), expected)
    assert_widths(source, tmp_path / "cut", channels)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_is_cut_whether_it_is_tied_or_not(specimen: Specimen, tied: bool, tmp_path: Path) -> None:
    model = specimen.model(1, tied=tied)
    channels = draw_channels(model)
    cut_checkpoint(release(model, tmp_path / "source"), tmp_path / "cut", channels=channels)
    with narrowed(model, channels):
        assert_close(logits(reloaded(tmp_path / "cut")), logits(model))


def test_a_cut_model_can_be_cut_again(specimen: Specimen, tmp_path: Path) -> None:
    model = specimen.model(LAYERS, key_value_heads=4)
    source = release(model, tmp_path / "source")
    first = draw_channels(model)
    cut_checkpoint(source, tmp_path / "once", REMOVED, first)
    second = draw_channels(load_model(tmp_path / "once"), seed=1, multiple=4)
    cut_checkpoint(tmp_path / "once", tmp_path / "twice", channels=second)
    cut_checkpoint(source, tmp_path / "at-once", REMOVED, joined(first, second, widths_of(model)))
    assert torch.equal(logits(reloaded(tmp_path / "twice")), logits(reloaded(tmp_path / "at-once")))
    assert PrunableCheckpoint.open(tmp_path / "twice").config == PrunableCheckpoint.open(tmp_path / "at-once").config


def joined(first: Channels, second: Channels, widths: Widths) -> Channels:
    """Return what has gone, by the release's own numbers, when `second` goes from the model that lost `first` and REMOVED."""

    def of_one_layer(axis: Axis, gone: Sequence[int], then: Sequence[int]) -> tuple[int, ...]:
        left = [channel for channel in range(widths.of(axis)) if channel not in gone]
        return tuple(sorted({*gone, *(left[channel] for channel in then)}))

    def of_each_layer(axis: Axis) -> tuple[tuple[int, ...], ...]:
        of_first, of_second = getattr(first, axis), iter(getattr(second, axis))
        return tuple(
            gone if layer in REMOVED else of_one_layer(axis, gone, next(of_second))
            for layer, gone in enumerate(of_first)
        )

    hidden = of_one_layer("hidden", first.hidden, second.hidden)
    return Channels(hidden=hidden, ffn=of_each_layer("ffn"), heads=of_each_layer("heads"))


def assert_widths(source: Path, cut: Path, channels: Channels) -> None:
    """The config states what stays, a head is as wide as it was, and every layer has the same shapes."""
    before, after = PrunableCheckpoint.open(source), PrunableCheckpoint.open(cut)
    layout = layout_of(before.family)
    was, now = layout.widths(before.config), layout.widths(after.config)
    assert [now.of(axis) for axis in AXES] == [was.of(axis) - channels.count(axis) for axis in AXES]
    assert (now.head, now.heads // now.groups) == (was.head, was.heads // was.groups)
    assert after.parameters < before.parameters
    shapes: dict[int, set[tuple[int, ...]]] = {}
    for name, tensor in after.tensors.items():
        if block := after.family.block_of(name):
            shapes.setdefault(block[0], set()).add(tensor.shape)
    assert all(found == shapes[0] for found in shapes.values())
