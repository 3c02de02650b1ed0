"""A quantised checkpoint counts the parameters of the model it was made from, whatever packs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.lib.errors import Refusal
from components.lib.transformer.checkpoint import Checkpoint, PrunableCheckpoint, load_model, require_loadable
from tests.components.lib.transformer.packed import FORMATS, gptq, quantise, zeros
from tests.components.lib.transformer.zoo import SPECIMENS, release

LLAMA = SPECIMENS[0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_model_has_as_many_parameters_as_before(name: str, tmp_path: Path) -> None:
    folder = release(LLAMA.model(2), tmp_path)
    before = Checkpoint.open(folder)
    after = Checkpoint.open(quantise(folder, *FORMATS[name]))
    assert after.parameters == before.parameters
    assert after.bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert after.bytes < before.bytes
    assert (after.layers, after.widths, after.longest_context) == (2, before.widths, 64)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_model_cannot_be_pruned(name: str, tmp_path: Path) -> None:
    quantise(release(LLAMA.model(2), tmp_path), *FORMATS[name])
    with pytest.raises(Refusal, match=r"weights are quantised( \(\w+\))?: prune the full-precision release"):
        PrunableCheckpoint.open(tmp_path)


@pytest.mark.parametrize("stated", [None, {"quant_method": "gptq"}, {"bits": "four"}])
def test_packed_weights_whose_bits_are_not_stated_are_refused_when_counted(stated: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(quantise(release(LLAMA.model(2), tmp_path), gptq(4), stated))
    with pytest.raises(Refusal, match=r"the weights of model\.layers\.0\.[a-z_.]+ are packed .* set its field bits"):
        _ = checkpoint.parameters


def test_masks_and_positions_are_no_parameters(tmp_path: Path) -> None:
    folder = release(LLAMA.model(2), tmp_path)
    before = Checkpoint.open(folder).parameters
    others = {"mask": torch.ones(4, 4, dtype=torch.bool), "position_ids": torch.arange(64)}
    save_file(load_file(folder / "model.safetensors") | others, folder / "model.safetensors")
    assert Checkpoint.open(folder).parameters == before


def test_a_float_tensor_named_scales_counts_where_nothing_is_quantised(tmp_path: Path) -> None:
    folder = release(LLAMA.model(2), tmp_path)
    before = Checkpoint.open(folder).parameters
    save_file(load_file(folder / "model.safetensors") | {"own.scales": zeros(3)}, folder / "model.safetensors")
    assert Checkpoint.open(folder).parameters == before + 3


@pytest.mark.parametrize("load", [load_model, require_loadable])
def test_a_quantisation_whose_library_is_not_installed_is_refused(
    load: Callable[[Path], object], tmp_path: Path
) -> None:
    quantise(release(LLAMA.model(2), tmp_path), *FORMATS["gptq-4"])
    with pytest.raises(Refusal, match="cannot be loaded with the libraries installed here"):
        load(tmp_path)
