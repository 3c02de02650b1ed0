"""The contract every family is held to, on a tiny random model of each of its shapes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from components.lib.transformer import surgery
from components.lib.transformer.checkpoint import Checkpoint
from components.lib.transformer.export import save_model, verify_cut
from components.lib.transformer.gates import Placement, blocks, bypassed, gated, skipped
from components.lib.transformer.surgery import cut_checkpoint, drop_layers
from tests.components.lib.transformer.zoo import LENGTH, SPECIMENS, Specimen, logits, prompts, release

LAYERS = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUTS = {"first": (0,), "middle": (2, 3), "last": (4, 5), "scattered": (0, 2, 5)}


@pytest.fixture(scope="module", params=SPECIMENS, ids=lambda specimen: specimen.name)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    return request.param


@pytest.fixture
def model(dense: PreTrainedModel) -> PreTrainedModel:
    """The release, to do with as one likes."""
    return copy.deepcopy(dense)


@pytest.fixture(params=CUTS.values(), ids=CUTS.keys())
def layers(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


@pytest.fixture
def skipping(dense: PreTrainedModel, layers: tuple[int, ...]) -> Tensor:
    """The logits of the release with the layers skipped: what every cut must give."""
    with skipped(dense, layers):
        return logits(dense)


def reloaded(folder: Path) -> PreTrainedModel:
    """Load as a stranger would, and let nothing pass that transformers only warns of."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_of_one_leaves_the_logits_bit_for_bit(specimen: Specimen, dtype: torch.dtype) -> None:
    model = specimen.model(LAYERS, dtype=dtype)
    expected = logits(model)
    for placement in get_args(Placement):
        with gated(model, torch.ones(LAYERS, requires_grad=True), placement):
            assert torch.equal(logits(model), expected)


def test_a_branch_gate_of_zero_is_a_skipped_layer(
    model: PreTrainedModel, skipping: Tensor, layers: tuple[int, ...]
) -> None:
    gates = torch.ones(LAYERS)
    gates[list(layers)] = 0
    with gated(model, gates, "branch"):
        assert torch.equal(logits(model), skipping)


def test_a_bypassed_layer_is_a_skipped_layer(model: PreTrainedModel, skipping: Tensor, layers: tuple[int, ...]) -> None:
    with bypassed(model, layers):
        assert torch.equal(logits(model, use_cache=False), skipping)


def test_a_skipped_layer_changes_the_logits(model: PreTrainedModel, skipping: Tensor) -> None:
    assert (logits(model) - skipping).abs().max() > 0.1


def test_a_layer_dropped_in_memory_equals_it_skipped(
    model: PreTrainedModel, skipping: Tensor, layers: tuple[int, ...]
) -> None:
    drop_layers(model, layers)
    assert len(blocks(model)) == model.config.num_hidden_layers == LAYERS - len(layers)
    assert torch.equal(logits(model), skipping)
    assert_cache_changes_nothing(model)


def test_a_cut_on_disk_equals_the_layers_skipped(
    source: Path, skipping: Tensor, layers: tuple[int, ...], tmp_path: Path
) -> None:
    cut_checkpoint(source, tmp_path, layers)
    model = reloaded(tmp_path)
    assert torch.equal(logits(model), skipping)
    assert_cache_changes_nothing(model)
    assert_no_stale_field(tmp_path, LAYERS - len(layers))


def test_a_model_dropped_and_saved_equals_the_layers_skipped(
    source: Path, model: PreTrainedModel, skipping: Tensor, layers: tuple[int, ...], tmp_path: Path
) -> None:
    save_model(drop_layers(model, layers), source, tmp_path, removed=layers)
    assert torch.equal(logits(reloaded(tmp_path)), skipping)
    assert_no_stale_field(tmp_path, LAYERS - len(layers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_export_is_verified_and_keeps_the_dtype(specimen: Specimen, dtype: torch.dtype, tmp_path: Path) -> None:
    model = specimen.model(LAYERS, dtype=dtype)
    source = release(model, tmp_path / "source")
    cut_checkpoint(source, tmp_path / "cut", (1, 4))
    verification = verify_cut(source, tmp_path / "cut", (1, 4))
    assert verification.max_difference == 0
    save_model(model.float(), source, tmp_path / "saved")
    for folder in (source, tmp_path / "cut", tmp_path / "saved"):
        assert getattr(torch, Checkpoint.open(folder).dtype) == dtype


def test_shards_come_in_and_go_out(
    specimen: Specimen, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = release(specimen.model(LAYERS), tmp_path / "source", shard="40KB")
    monkeypatch.setattr(surgery, "SHARD_BYTES", 30_000)
    cut_checkpoint(sharded, tmp_path / "shards", (0, 4))
    monkeypatch.undo()
    cut_checkpoint(source, tmp_path / "one", (0, 4))
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(reloaded(tmp_path / "shards")), logits(reloaded(tmp_path / "one")))


def test_a_cut_model_can_be_cut_again(source: Path, dense: PreTrainedModel, tmp_path: Path) -> None:
    cut_checkpoint(source, tmp_path / "once", (1, 3))  # 0 2 4 5 stay
    cut_checkpoint(tmp_path / "once", tmp_path / "twice", (0, 2))  # 2 5 stay
    cut_checkpoint(source, tmp_path / "at-once", (0, 1, 3, 4))
    with skipped(dense, (0, 1, 3, 4)):
        assert torch.equal(logits(reloaded(tmp_path / "twice")), logits(dense))
    assert Checkpoint.open(tmp_path / "twice").config == Checkpoint.open(tmp_path / "at-once").config


def test_what_travels_with_the_weights_is_the_release_s_own(
    source: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    cut_checkpoint(source, tmp_path / "cut", (0,))
    save_model(model, source, tmp_path / "saved")
    names = {path.name for path in source.iterdir()} - {"config.json", "model.safetensors"}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"} <= names
    for out in (tmp_path / "cut", tmp_path / "saved"):
        assert {path.name for path in out.iterdir()} == names | {"config.json", "model.safetensors"}
        assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
        assert AutoTokenizer.from_pretrained(out).chat_template


def assert_cache_changes_nothing(model: PreTrainedModel) -> None:
    """Greedy generation of a left-padded batch is the same with a key-value cache as without."""
    tokens, mask = prompts()
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    cached = model.generate(tokens, use_cache=True, **settings)
    uncached = model.generate(tokens, use_cache=False, **settings)
    assert cached.shape == (len(tokens), LENGTH + 4)
    assert torch.equal(cached, uncached)


def assert_no_stale_field(folder: Path, layers: int) -> None:
    """The config counts the layers that stay, and none of its lists speaks of one that went."""
    config = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.layers == layers
    for name in ("layer_types", "no_rope_layers"):
        assert len(config.get(name) or [None] * layers) == layers
    assert all(index < layers for index in config.get("mlp_only_layers") or [])
    assert not {"sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval"} & set(config)
