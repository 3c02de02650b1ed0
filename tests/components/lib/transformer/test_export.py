"""Exports carry what they should, and a wrong one is caught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from components.lib.transformer.checkpoint import WEIGHTS, Checkpoint, load_model
from components.lib.transformer.export import VerificationError, answers, save_model, verify_cut, verify_export
from components.lib.transformer.selection import Channels
from components.lib.transformer.surgery import cut_checkpoint, drop_layers
from tests.components.lib.transformer.zoo import MODERN, SPECIMENS, release

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(BY_NAME["gemma2"].model(5), tmp_path_factory.mktemp("source"))


@pytest.fixture
def cut(source: Path, tmp_path: Path) -> Path:
    """The source without layers 1 and 2, waiting to be spoilt."""
    cut_checkpoint(source, tmp_path / "cut", (1, 2))
    return tmp_path / "cut"


def test_a_right_cut_is_verified_and_recorded(source: Path, cut: Path) -> None:
    verification = verify_cut(source, cut, (2, 1))
    verification.save(cut)
    record = json.loads((cut / "verification.json").read_text())
    assert record["removed"] == [1, 2]
    assert record["layers"] == 3
    assert record["dtype"] == "float32"
    assert record["parameters"] == Checkpoint.open(cut).parameters
    assert record["max_difference"] == 0
    assert record["cache_difference"] < 1e-5


def test_a_cut_of_other_layers_is_caught(source: Path, cut: Path) -> None:
    with pytest.raises(VerificationError, match=r"holds another layers\.0"):
        verify_cut(source, cut, (0, 1))


def rotate_layer_types(cut: Path) -> None:
    config = json.loads((cut / "config.json").read_text())
    first, *rest = config["layer_types"]
    (cut / "config.json").write_text(json.dumps(config | {"layer_types": [*rest, first]}))


def test_a_stale_config_is_caught(source: Path, cut: Path) -> None:
    rotate_layer_types(cut)
    with pytest.raises(VerificationError, match=r"config\.json's layer_types"):
        verify_cut(source, cut, (1, 2))


def test_other_logits_are_caught(cut: Path) -> None:
    """Every tensor is right, and the layers attend over the wrong windows."""
    expected = answers(load_model(cut))
    rotate_layer_types(cut)
    with pytest.raises(VerificationError, match="does not compute what it was exported from"):
        verify_export(expected, cut)


@pytest.mark.parametrize("spoil", ["lose", "leave over", "change"])
def test_a_wrong_tensor_is_caught(source: Path, cut: Path, spoil: str) -> None:
    tensors = load_file(cut / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    if spoil == "lose":
        del tensors[name]
    elif spoil == "leave over":
        tensors["model.layers.1.mlp.old.weight"] = tensors[name].clone()
    else:
        tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"tensor layers\.1\.mlp|holds another layers\.1\.mlp"):
        verify_cut(source, cut, (1, 2))


def test_a_folder_that_does_not_load_whole_is_caught(source: Path, cut: Path) -> None:
    expected = answers(load_model(cut))
    tensors = load_file(cut / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="missing keys"):
        verify_export(expected, cut)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_cache_that_is_not_renumbered_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers that share one part of the cache generate other text than without it, or cannot."""
    model = BY_NAME[name].model(3)
    expected = answers(model)
    model.get_decoder().layers[2].self_attn.layer_idx = 0
    monkeypatch.setattr("components.lib.transformer.export.load_model", lambda folder, **settings: model)
    with pytest.raises(VerificationError, match="with its key-value cache"):
        verify_export(expected, release(BY_NAME[name].model(3), tmp_path))


def test_masters_are_saved_in_the_release_s_dtype_and_compute_what_was_saved(tmp_path: Path) -> None:
    source = release(BY_NAME["llama"].model(3, dtype=torch.bfloat16), tmp_path / "source")
    model = load_model(source, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    save_model(model, source, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").dtype == "bfloat16"
    verify_export(answers(model), tmp_path / "out")


def test_a_model_cut_in_memory_is_saved_with_the_layers_it_lost(source: Path, tmp_path: Path) -> None:
    model = drop_layers(load_model(source), (0, 4))
    save_model(model, source, tmp_path / "out", removed=(0, 4))
    verify_cut(source, tmp_path / "out", (0, 4))


def test_a_model_of_other_layers_than_it_says_is_not_saved(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model has 4 layers, but .* has 5 of which 0 are removed"):
        save_model(drop_layers(load_model(source), (0,)), source, tmp_path / "out")


def test_adapters_are_saved_merged_only(source: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(load_model(source), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_model(adapted.get_base_model(), source, tmp_path / "out")
    merged = adapted.merge_and_unload()
    save_model(merged, source, tmp_path / "out")
    verify_export(answers(merged), tmp_path / "out")


CHANNELS = Channels(hidden=tuple(range(0, 32, 2)), ffn=(tuple(range(24)),) * 3, heads=((0,), (1,), (1,)))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return release(BY_NAME["llama"].model(3, dtype=torch.bfloat16), tmp_path / "dense")


@pytest.fixture
def narrow(dense: Path, tmp_path: Path) -> Path:
    """The dense model without layer 1 and CHANNELS, waiting to be spoilt."""
    cut_checkpoint(dense, tmp_path / "narrow", (1,), CHANNELS)
    return tmp_path / "narrow"


def test_a_cut_of_layers_and_channels_is_verified_within_rounding(dense: Path, narrow: Path) -> None:
    verification = verify_cut(dense, narrow, (1,), CHANNELS)
    assert (verification.layers, verification.dtype) == (2, "bfloat16")
    assert verification.parameters == Checkpoint.open(narrow).parameters < Checkpoint.open(dense).parameters


@pytest.mark.parametrize(
    ("axis", "others", "tensor"),
    [
        ("hidden", tuple(range(1, 32, 2)), r"lm_head\.weight"),
        ("ffn", (tuple(range(24)), tuple(range(24)), tuple(range(1, 25))), r"layers\.1\.mlp"),
        ("heads", ((0,), (1,), (0,)), r"layers\.1\.self_attn"),
    ],
)
def test_a_cut_of_other_channels_is_caught(dense: Path, narrow: Path, axis: str, others: object, tensor: str) -> None:
    """As many, so that every shape and the config are right."""
    asked = Channels.model_validate(CHANNELS.model_dump() | {axis: others})
    with pytest.raises(VerificationError, match=f"holds another .*{tensor}"):
        verify_cut(dense, narrow, (1,), asked)


@pytest.mark.parametrize(
    ("axis", "more", "field"),
    [
        ("hidden", (0, *range(16, 32)), "hidden_size is 16 and should be 15"),
        ("ffn", (tuple(range(25)),) * 3, "intermediate_size is 24 and should be 23"),
        ("heads", (), "num_attention_heads is 2 and should be 4"),
    ],
)
def test_a_cut_of_another_width_is_caught(dense: Path, narrow: Path, axis: str, more: object, field: str) -> None:
    asked = Channels.model_validate(CHANNELS.model_dump() | {axis: more})
    with pytest.raises(VerificationError, match=rf"config\.json's {field}"):
        verify_cut(dense, narrow, (1,), asked)


def test_a_slice_of_other_bytes_is_caught(dense: Path, narrow: Path) -> None:
    tensors = load_file(narrow / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 0.5
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"holds another layers\.1\.mlp\.down_proj\.weight"):
        verify_cut(dense, narrow, (1,), CHANNELS)


def test_channels_rotated_among_the_query_heads_are_caught(dense: Path, narrow: Path) -> None:
    """Even where only the logits tell: heads that read another position are another model."""
    expected = answers(load_model(narrow))
    tensors = load_file(narrow / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].roll(1, 0)}, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="does not compute what it was exported from"):
        verify_export(expected, narrow, exact=False)


class TestDtypesOfTheirOwn:
    """A release stores some tensors in fp32 beside bf16: routers, norms, decays of a state, another tower."""

    NAMES = ("model.norm.weight", "model.layers.1.input_layernorm.weight")

    @pytest.fixture
    def mixed(self, tmp_path: Path) -> Path:
        """A release in bf16 with two tensors in fp32, of numbers that bf16 does not have."""
        folder = release(SPECIMENS[0].model(3, dtype=torch.bfloat16), tmp_path / "mixed")
        tensors = load_file(folder / WEIGHTS)
        draw = torch.Generator().manual_seed(3)
        tensors |= {name: torch.randn(tensors[name].shape, generator=draw) for name in self.NAMES}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    def test_survive_with_the_bytes_of_the_source_if_nothing_changed_them(self, mixed: Path, tmp_path: Path) -> None:
        save_model(load_model(mixed), mixed, tmp_path / "out")
        before, after = load_file(mixed / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
        assert {name: tensor.dtype for name, tensor in after.items()} == {
            name: one.dtype for name, one in before.items()
        }
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_survive_with_new_values_and_behind_removed_layers(self, mixed: Path, tmp_path: Path) -> None:
        model = drop_layers(load_model(mixed), [0])
        with torch.no_grad():
            model.model.norm.weight += 1
        save_model(model, mixed, tmp_path / "out", removed=[0])
        before, after = load_file(mixed / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
        assert after["model.norm.weight"].dtype == torch.float32
        assert torch.equal(after["model.norm.weight"], model.model.norm.weight.float())
        assert torch.equal(
            after["model.layers.0.input_layernorm.weight"], before["model.layers.1.input_layernorm.weight"]
        )
        assert sorted(path.name for path in (tmp_path / "out").glob("*safetensors*")) == [WEIGHTS]

    def test_a_parameter_that_transformers_keeps_in_fp32_is_not_rounded(self, tmp_path: Path) -> None:
        """ERNIE's router."""
        (specimen,) = (specimen for specimen in MODERN if specimen.name == "ernie4_5_moe")
        folder = release(specimen.model(4, dtype=torch.bfloat16), tmp_path / "release")
        tensors = load_file(folder / WEIGHTS)
        name = "model.layers.3.mlp.gate.weight"
        tensors[name] = tensors[name].float() + 1e-5
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        model = load_model(folder)
        with torch.no_grad():
            model.get_parameter(name).mul_(1.0001)
        save_model(model, folder, tmp_path / "out")
        assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[name], tensors[name] * 1.0001)
