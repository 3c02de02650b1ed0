"""Releases in GGUF files become the plain checkpoints that they were made from, or are refused by what transformers does not read of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.errors import Refusal
from components.lib.transformer.checkpoint import PrunableCheckpoint, load_model, load_tokenizer
from components.lib.transformer.dequantise import opened
from components.lib.transformer.export import verify_cut
from components.lib.transformer.gguf import gguf_of, promised, unpack
from components.lib.transformer.surgery import cut_checkpoint
from tests.components.lib.transformer import qwen35
from tests.components.lib.transformer.zoo import LINEAR, MODERN, SPECIMENS, VOCABULARY, Specimen, logits

WIDE = {"intermediate_size": 64}  # whole blocks of 32
BY_NAME = {specimen.name: specimen for specimen in (*SPECIMENS, *MODERN)}
NAMES = ("llama", "qwen2", "qwen3", "gemma2", "qwen3_moe", "qwen3_5")
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "qwen3_5_text": "qwen35"}


def specimen(name: str) -> Specimen:
    """Return a specimen without the settings that a GGUF file does not hold, in the widths that its blocks need."""
    settings: dict[str, Any] = {"sliding_window": 4096, "head_dim": 8} if name == "gemma2" else {}
    if name == "qwen3_moe":
        settings = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 768,
            "head_dim": 8,
            "norm_topk_prob": True,
        }
    if name == "qwen3_5":
        settings = {**LINEAR, "head_dim": 32}
    if name == "qwen3":
        settings = {"head_dim": 128}  # transformers reads no other from a GGUF file of this architecture
    return Specimen(name, BY_NAME[name].model_type, WIDE | settings)


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    quantised: bool = False,
    settings: Mapping[str, Any] = {},
    tensors: Mapping[str, Tensor] = {},
    architecture: str | None = None,
) -> Path:
    """Write a model as llama.cpp does: rotary dimensions of Llama interleaved, Gemma's norms with their 1, experts in one tensor."""
    config = model.config
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, architecture or kind)
    stated: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else config.hidden_size // 4,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if kind == "llama":
        stated["rope.dimension_count"] = config.head_dim
    if kind == "gemma2":
        stated |= {
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "attention.sliding_window": config.sliding_window,
        }
    if kind == "qwen3moe":
        stated |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        stated["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind == "qwen35":
        stated |= qwen35.settings(model, heads=int(any("nextn" in name for name in tensors)))
    for name, value in (stated | dict(settings)).items():
        add: dict[type, Callable[..., None]] = {
            list: writer.add_array,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](name if "general" in name or "split" in name else f"{architecture or kind}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", *(chr(0x21 + number) for number in range(VOCABULARY - 4)), "ab"])
    writer.add_token_types([3, 3, 3, *(1 for _ in range(VOCABULARY - 3))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for name, tensor in {**_renamed(model, kind), **tensors}.items():
        values = tensor.float().numpy()
        if quantised and values.ndim > 1:
            writer.add_tensor(
                name,
                gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0),
                raw_dtype=gguf.GGMLQuantizationType.Q8_0,
            )
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _renamed(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    if kind == "qwen35":
        return qwen35.renamed(model)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            block = f"blk.{name.split('.')[2]}"
            gate, up = tensor.chunk(2, dim=1)
            found |= {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
            continue
        module, _, last = name.rpartition(".")
        if last not in ("weight", "bias"):
            module, last = name, "weight"
        if kind == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = model.config.num_attention_heads if "q_proj" in module else model.config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if kind == "gemma2" and "norm" in module:
            tensor = tensor + 1
        new = names.get_name(module)
        assert new, module
        found[f"{new}.{last}"] = tensor
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_file_becomes_the_model_that_it_was_written_from(name: str, tmp_path: Path) -> None:
    """In fp32, so that nothing is rounded but the norms that are stored with their 1. It can be cut, and its tokenizer travels."""
    model = specimen(name).model(3)
    file = write_gguf(model, tmp_path / "model.gguf")
    out = tmp_path / "plain"
    unpack(file, out)
    plain = load_model(out)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    tokens = load_tokenizer(out)("abc", add_special_tokens=False)["input_ids"]
    assert tokens == [VOCABULARY - 1, 3 + ord("c") - 0x21]  # "ab" is merged
    assert (out / "chat_template.jinja").is_file()
    cut_checkpoint(out, tmp_path / "cut", (1,))
    assert verify_cut(out, tmp_path / "cut", (1,)).max_difference == 0


def test_quantised_weights_become_bf16(tmp_path: Path) -> None:
    model = specimen("llama").model(2, dtype=torch.bfloat16)
    file = write_gguf(model, tmp_path / "model-Q8_0.gguf", quantised=True)
    unpack(file, tmp_path / "plain")
    plain = load_model(tmp_path / "plain")
    weights = model.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    eight = gguf.GGMLQuantizationType.Q8_0
    rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weights, eight), eight)).bfloat16()
    assert torch.equal(plain.model.layers[1].mlp.up_proj.weight, rounded)
    assert promised(file).types == "Q8_0"
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_what_is_written_is_known_before(tmp_path: Path) -> None:
    """The checks before a run, and the plan of its memory, read no weight."""
    file = write_gguf(specimen("llama").model(2), tmp_path / "model.gguf", quantised=True)
    before = opened(tmp_path)
    unpack(file, tmp_path / "plain")
    after = PrunableCheckpoint.open(tmp_path / "plain")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in before.tensors.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in after.tensors.items()
    }
    assert (before.bytes, before.widths, before.layers) == (after.bytes, after.widths, after.layers)


def test_a_release_is_the_file_or_a_folder_with_one(tmp_path: Path) -> None:
    file = tmp_path / "one.gguf"
    file.write_bytes(b"GGUF")
    assert gguf_of(file) == gguf_of(tmp_path) == file
    (tmp_path / "two.gguf").write_bytes(b"GGUF")
    with pytest.raises(Refusal, match=r"holds 2 GGUF files, such as one\.gguf and two\.gguf: name one of them"):
        gguf_of(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert gguf_of(tmp_path) is None


def test_the_card_and_the_licence_of_a_folder_travel(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    write_gguf(specimen("llama").model(2), folder / "model.gguf")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "LICENSE").write_text("Take it.\n")
    unpack(folder, tmp_path / "plain")
    assert (tmp_path / "plain" / "README.md").read_text() == "---\nlicense: mit\n---\n"
    assert (tmp_path / "plain" / "LICENSE").read_text() == "Take it.\n"


def why_refused(folder: Path, model: PreTrainedModel | None = None, **written: Any) -> str:
    """Write a model to a file in the folder, and return why it is refused; nothing is left of it."""
    file = write_gguf(model or specimen("llama").model(2), folder / "model.gguf", **written)
    with pytest.raises(Refusal) as refusal:
        unpack(file, folder / "plain")
    assert not (folder / "plain").exists()
    return str(refusal.value)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    return partial(why_refused, tmp_path)


class TestAFileIsRefused:
    def test_of_an_architecture_that_transformers_does_not_read(self, refused: Callable[..., str]) -> None:
        named = {"general.base_model.0.repo_url": "https://huggingface.co/org/full"}
        said = refused(architecture="falcon3", settings=named)
        assert "is of the architecture 'falcon3', of which transformers makes no model" in said
        assert "name the release in safetensors that it was made from (it names org/full)" in said

    def test_of_a_family_that_is_not_supported(self, refused: Callable[..., str]) -> None:
        assert "is an encoder-decoder" in refused(architecture="t5")

    def test_that_is_one_of_several_parts(self, refused: Callable[..., str]) -> None:
        assert "is one of 3 parts of a model: join them" in refused(settings={"split.count": 3})

    def test_without_a_tensor_of_the_model(self, tmp_path: Path) -> None:
        file = write_gguf(specimen("llama").model(2), tmp_path / "model.gguf", settings={"block_count": 3})
        with pytest.raises(Refusal, match=r"does not hold the model that its settings describe: .* model\.layers\.2"):
            unpack(file, tmp_path / "plain")

    def test_if_the_package_that_reads_it_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = write_gguf(specimen("llama").model(2), tmp_path / "model.gguf")
        monkeypatch.setitem(__import__("sys").modules, "gguf", None)
        with pytest.raises(
            Refusal, match=r"the package gguf, which reads it, is not installed: install espalier\[gguf\]"
        ):
            opened(file)

    @pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 0.99])
    def test_that_is_cut_short(self, part: float, tmp_path: Path) -> None:
        file = write_gguf(specimen("llama").model(2), tmp_path / "model.gguf")
        whole = file.read_bytes()
        file.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(Refusal, match=r"is no whole GGUF file .*: it was cut short or changed, so get it again"):
            opened(file)
