"""The core of the contract, on one cut of every family that test_contract.py does not hold to all of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.transformer.checkpoint import WEIGHTS, PrunableCheckpoint, load_model
from components.lib.transformer.export import VerificationError, answers, save_model, verify_cut, verify_export
from components.lib.transformer.families import FAMILIES
from components.lib.transformer.gates import bypassed, gated, skipped
from components.lib.transformer.narrow import narrowed
from components.lib.transformer.surgery import cut_checkpoint, drop_layers
from tests.components.lib.transformer.zoo import MODERN, Specimen, draw_channels, logits, release

LAYERS = 6
REMOVED = (0, 3)
"""The first layer, and one whose neighbours are of other types in the specimens' lists."""

NARROW = [specimen for specimen in MODERN if FAMILIES[specimen.model_type].layout]


@pytest.fixture(scope="module", params=MODERN, ids=str)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    return request.param


@pytest.fixture(scope="module")
def skipping(dense: PreTrainedModel) -> Tensor:
    """The logits of the release with the layers skipped: what every cut must give."""
    with skipped(dense, REMOVED):
        return logits(dense)


def test_gates_and_skips_are_exact(dense: PreTrainedModel, skipping: Tensor) -> None:
    """A gate of 1 changes nothing; a gate of 0, a skip and a bypass are the same, and change the logits."""
    plain, gates = logits(dense), torch.ones(LAYERS)
    with gated(dense, gates):
        assert torch.equal(logits(dense), plain)
        gates[list(REMOVED)] = 0
        assert torch.equal(logits(dense), skipping)
    with bypassed(dense, REMOVED):
        assert torch.equal(logits(dense, use_cache=False), skipping)
    assert (plain - skipping).abs().max() > 0.1


def test_a_cut_on_disk_and_in_memory_equal_the_layers_skipped(
    source: Path, dense: PreTrainedModel, skipping: Tensor, tmp_path: Path
) -> None:
    """And the cut on disk is verified: it loads whole, has the same bytes and logits bit for bit, and generates with its cache as without."""
    cut_checkpoint(source, tmp_path / "cut", REMOVED)
    assert verify_cut(source, tmp_path / "cut", REMOVED).max_difference == 0
    model = drop_layers(copy.deepcopy(dense), REMOVED)
    assert torch.equal(logits(model), skipping)
    save_model(model, source, tmp_path / "saved", removed=REMOVED)
    assert_same_files(tmp_path / "saved", tmp_path / "cut")


def assert_same_files(folder: Path, other: Path) -> None:
    """Two checkpoints hold the same config and the same tensors."""
    assert PrunableCheckpoint.open(folder).config == PrunableCheckpoint.open(other).config
    a, b = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("specimen", NARROW, ids=str, indirect=True)
def test_channels_and_layers_go_together(source: Path, dense: PreTrainedModel, tmp_path: Path) -> None:
    """Along all axes: gates of 0 compute what the cut model computes."""
    channels = draw_channels(dense)
    with narrowed(dense, channels), skipped(dense, REMOVED):
        expected = logits(dense)
    cut_checkpoint(source, tmp_path, REMOVED, channels)
    assert verify_cut(source, tmp_path, REMOVED, channels).cache_difference < 1e-5
    assert (logits(load_model(tmp_path)) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["deepseek_v32", "axk2"])
def test_an_indexer_is_held_for_texts_of_which_every_token_is_selected(name: str, tmp_path: Path) -> None:
    """In longer ones the dense model itself generates other text with its cache: when transformers mends that, docs/families.md can say so."""
    specimen = next(specimen for specimen in MODERN if specimen.name == name)
    model = replace(specimen, settings=specimen.settings | {"index_topk": 8}).model()
    release(model, tmp_path)
    with pytest.raises(VerificationError, match="generates other text with its key-value cache than without"):
        verify_export(answers(model), tmp_path)
