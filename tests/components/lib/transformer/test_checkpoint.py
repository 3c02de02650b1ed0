"""What opening a folder tells, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from components.lib.errors import Refusal
from components.lib.transformer.checkpoint import (
    Checkpoint,
    PrunableCheckpoint,
    load_model,
    load_tokenizer,
    require_loadable,
)
from components.lib.transformer.families import FAMILIES
from tests.components.lib.transformer.zoo import SPECIMENS, VOCABULARY, release

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return release(BY_NAME["llama"].model(3), tmp_path / "release")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return release(BY_NAME["llama"].model(3), tmp_path / "sharded", shard="20KB")


def edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_headers_tell_what_the_model_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    model = BY_NAME["gemma2"].model(3, dtype=dtype)
    checkpoint = Checkpoint.open(release(model, tmp_path))
    assert checkpoint.layers == 3
    assert checkpoint.parameters == model.num_parameters()
    assert checkpoint.bytes == model.num_parameters() * dtype.itemsize
    assert getattr(torch, checkpoint.dtype) == dtype
    assert checkpoint.family is FAMILIES["gemma2"]


def test_shards_are_one_checkpoint(folder: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert Checkpoint.open(sharded).parameters == Checkpoint.open(folder).parameters


OTHERS: dict[str, dict[str, object]] = {
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
"""Families that the table does not have."""


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_model_of_another_family_is_read_and_not_pruned(model_type: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **OTHERS[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(release(model, tmp_path))
    assert (checkpoint.family, checkpoint.widths, checkpoint.layers) == (None, None, 2)
    assert checkpoint.parameters == model.num_parameters()
    assert checkpoint.dtype == "bfloat16"
    assert len(load_model(tmp_path).state_dict()) == len(model.state_dict())
    with pytest.raises(Refusal, match=f"the model type '{model_type}' is not supported"):
        PrunableCheckpoint.open(tmp_path)


def test_the_text_model_of_a_multimodal_one_is_read_and_not_pruned(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mllama", "text_config": config, "vision_config": {}})
    )
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.family, checkpoint.layers, checkpoint.longest_context) == (None, 3, 64)
    with pytest.raises(Refusal, match="wraps a text model"):
        PrunableCheckpoint.open(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "not-yet-known"},
        {"model_type": "not-yet-known", "auto_map": {"AutoConfig": "code.Config"}},
        {"quantization_config": {"quant_method": "not-yet-known"}},
    ],
)
def test_a_model_that_the_libraries_do_not_know_is_refused_before_it_is_loaded(folder: Path, fields: dict) -> None:
    require_loadable(folder)
    edit(folder, **fields)
    with pytest.raises(Refusal, match="cannot be loaded with the libraries installed here"):
        require_loadable(folder)


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len", "seq_length"])
def test_the_longest_context_is_read_under_any_of_its_names(folder: Path, name: str) -> None:
    edit(folder, max_position_embeddings=None)
    assert Checkpoint.open(folder).longest_context is None
    edit(folder, **{name: 4096})
    assert Checkpoint.open(folder).longest_context == 4096


def test_constants_that_old_releases_stored_are_no_parameters(tmp_path: Path) -> None:
    model = BY_NAME["gpt2"].model(2)
    release(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).parameters == model.num_parameters()


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)


def test_adapters_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Refusal, match="holds adapters"):
        Checkpoint.open(tmp_path)


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(Refusal, match=r"config\.json cannot be read"):
        Checkpoint.open(folder)


def test_gguf_weights_are_refused_with_the_way_to_dequantise_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    with pytest.raises(Refusal, match=r'GGUF weights only \(model-Q4_K_M\.gguf\).*gguf_file="model-Q4_K_M\.gguf"'):
        Checkpoint.open(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Refusal, match=r"pickled weights only \(pytorch_model\.bin\)"):
        Checkpoint.open(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(Refusal, match="holds neither"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_refused(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(Refusal, match=f"names {shard.name}, which the folder lacks"):
        Checkpoint.open(sharded)


def test_a_shard_without_its_tensor_is_refused(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shutil.copyfile(shards[1], shards[0])
    with pytest.raises(Refusal, match="promises"):
        Checkpoint.open(sharded)


def test_a_file_cut_short_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Refusal, match="was cut short"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0not json", b"<html>no such file</html>"])
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(Refusal, match="is no whole safetensors file"):
        Checkpoint.open(folder)


def test_quantised_tensors_are_refused_without_a_word_in_the_config(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.qweight": torch.ones(2, dtype=torch.int32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Refusal, match=r"qweight as I32, so its weights are quantised"):
        PrunableCheckpoint.open(folder)


@pytest.mark.parametrize(("stated", "said"), [(2, "holds tensors of layer 2"), (4, "has no tensors of layer 3")])
def test_a_careless_cut_is_refused(folder: Path, stated: int, said: str) -> None:
    """transformers would drop the layer, or fill it at random, and load."""
    edit(folder, num_hidden_layers=stated)
    with pytest.raises(Refusal, match=said):
        PrunableCheckpoint.open(folder)


def test_a_tensor_that_is_not_there_is_no_random_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Refusal, match=r"1 missing keys, such as model\.norm\.weight"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    edit(folder, intermediate_size=40)
    with pytest.raises(
        Refusal,
        match=r"mismatched keys, such as model\.layers\.0\.mlp\.down_proj\.weight \(stored \[32, 48\], the model has \[32, 40\]\)",
    ):
        load_model(folder)


def test_a_model_loads_as_stored_and_in_evaluation_mode(folder: Path) -> None:
    model = load_model(folder)
    assert model.dtype == torch.float32
    assert not model.training
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_tokenizer_is_read_or_refused(folder: Path) -> None:
    assert load_tokenizer(folder)("w5 w7")["input_ids"] == [5, 7]
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(Refusal, match="no tokenizer"):
        load_tokenizer(folder)
