"""What is left on disk and in memory after a cut; that it computes the right thing is the contract's (test_contract.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.lib.errors import Refusal
from components.lib.transformer import surgery
from components.lib.transformer.checkpoint import Checkpoint, load_model
from components.lib.transformer.selection import Channels
from components.lib.transformer.surgery import cut_checkpoint, drop_layers
from tests.components.lib.transformer.zoo import PROJECTED, SPECIMENS, draw_channels, logits, release

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def test_the_tensors_left_are_the_release_s_bytes_under_new_numbers(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model(4, dtype=torch.bfloat16)
    cut_checkpoint(release(model, tmp_path / "source"), tmp_path / "cut", (0, 2))
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    for new, old in enumerate((1, 3)):
        for name, parameter in model.model.layers[old].named_parameters():
            assert torch.equal(tensors.pop(f"model.layers.{new}.{name}"), parameter)
    assert set(tensors) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_config_changes_in_what_the_cut_changes_only(tmp_path: Path) -> None:
    source = release(BY_NAME["llama"].model(4), tmp_path / "source")
    config = config_of(source) | {"a_field_of_the_release": "stays"}
    (source / "config.json").write_text(json.dumps(config))
    cut_checkpoint(source, tmp_path / "cut", (0,))
    assert config_of(tmp_path / "cut") == config | {"num_hidden_layers": 3}


def test_a_list_the_config_left_out_is_written(tmp_path: Path) -> None:
    """Gemma 2 alternates by the layer's index where config.json has no list: after a cut that would be another model."""
    source = release(BY_NAME["gemma2"].model(4), tmp_path / "source")
    config = config_of(source)
    whole = config.pop("layer_types")
    (source / "config.json").write_text(json.dumps(config))
    cut_checkpoint(source, tmp_path / "cut", (1,))
    assert isinstance(whole, list)
    assert config_of(tmp_path / "cut")["layer_types"] == [whole[0], whole[2], whole[3]]


def test_a_checkpoint_of_the_bare_base_model_is_cut(tmp_path: Path) -> None:
    """GPT-2's release names its blocks `h.0` and not `transformer.h.0`."""
    model = BY_NAME["gpt2"].model(3)
    source = release(model, tmp_path / "source")
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    cut_checkpoint(source, tmp_path / "cut", (1,))
    assert "h.1.ln_1.weight" in Checkpoint.open(tmp_path / "cut").tensors
    assert torch.equal(logits(load_model(tmp_path / "cut")), logits(drop_layers(model, [1])))


def test_constants_that_transformers_ignores_are_left_behind(tmp_path: Path) -> None:
    source = release(BY_NAME["gpt2"].model(2), tmp_path / "source")
    tensors = load_file(source / "model.safetensors") | {"transformer.h.1.attn.bias": torch.ones(1, 1, 8, 8)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    cut_checkpoint(source, tmp_path / "cut", (0,))
    assert not [name for name in load_file(tmp_path / "cut" / "model.safetensors") if name.endswith(".attn.bias")]


def test_shards_hold_at_most_their_size_and_the_index_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = release(BY_NAME["llama"].model(4), tmp_path / "source")
    monkeypatch.setattr(surgery, "SHARD_BYTES", 20_000)
    cut_checkpoint(source, tmp_path / "cut", (3,))
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == Checkpoint.open(tmp_path / "cut").bytes
    for file in files:
        tensors = load_file(tmp_path / "cut" / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000


def test_channels_that_stay_are_the_release_s_bytes(tmp_path: Path) -> None:
    model = BY_NAME["llama"].model(3, dtype=torch.bfloat16)
    channels = Channels(hidden=tuple(range(0, 16)), ffn=((0,), (1,), (2,)), heads=((0,), (1,), (0,)))
    cut_checkpoint(release(model, tmp_path / "source"), tmp_path / "cut", (1,), channels)
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    last = model.model.layers[2]
    expected = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight[:, 16:],
        "model.norm.weight": model.model.norm.weight[16:],
        "model.layers.1.self_attn.q_proj.weight": last.self_attn.q_proj.weight[16:, 16:],
        "model.layers.1.self_attn.v_proj.weight": last.self_attn.v_proj.weight[8:, 16:],
        "model.layers.1.self_attn.o_proj.weight": last.self_attn.o_proj.weight[16:, 16:],
        "model.layers.1.mlp.down_proj.weight": last.mlp.down_proj.weight[16:, [0, 1, *range(3, 48)]],
    }
    for name, weight in expected.items():
        assert torch.equal(tensors[name], weight)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_channels_are_cut_across_shards(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME[name].model(2)
    channels = draw_channels(model)
    cut_checkpoint(release(model, tmp_path / "source"), tmp_path / "one", channels=channels)
    sharded = release(model, tmp_path / "sharded", shard="20KB")
    monkeypatch.setattr(surgery, "SHARD_BYTES", 10_000)
    cut_checkpoint(sharded, tmp_path / "shards", channels=channels)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_model(tmp_path / "shards")), logits(load_model(tmp_path / "one")))
    assert Checkpoint.open(tmp_path / "shards").bytes == Checkpoint.open(tmp_path / "one").bytes


def test_a_cut_of_channels_that_the_layout_does_not_know_writes_nothing(tmp_path: Path) -> None:
    source = release(BY_NAME[PROJECTED].model(2), tmp_path / "source")
    with pytest.raises(Refusal, match="remove layers instead"):
        cut_checkpoint(source, tmp_path / "cut", channels=Channels(hidden=(0,)))
    assert not (tmp_path / "cut").exists()


def test_every_index_of_a_layer_in_memory_is_renumbered() -> None:
    model = drop_layers(BY_NAME["qwen2"].model(5), [0, 3])
    numbers = [
        module.layer_idx for block in model.model.layers for module in block.modules() if hasattr(module, "layer_idx")
    ]
    assert numbers == [0, 1, 2]
    assert (model.config.num_hidden_layers, len(model.config.layer_types), model.config.max_window_layers) == (3, 3, 1)


@pytest.mark.parametrize("layers", [(4,), (0, 1, 2, 3), (-1,)])
def test_an_impossible_cut_writes_nothing(layers: tuple[int, ...], tmp_path: Path) -> None:
    source = release(BY_NAME["llama"].model(4), tmp_path / "source")
    with pytest.raises(Refusal):
        cut_checkpoint(source, tmp_path / "cut", layers)
    assert not (tmp_path / "cut").exists()
