"""Releases in FP8 and MXFP4 are read as the bf16 models that transformers makes of them, and written as plain checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from components.lib.errors import Refusal
from components.lib.transformer.checkpoint import WEIGHTS, PrunableCheckpoint, load_model
from components.lib.transformer.dequantise import opened, packing
from components.lib.transformer.export import verify_cut
from components.lib.transformer.surgery import cut_checkpoint, write
from tests.components.lib.transformer.zoo import MODERN, SPECIMENS, Specimen, logits, release

BY_NAME = {specimen.name: specimen for specimen in (*SPECIMENS, *MODERN)}


def packed(folder: Path, tensors: dict[str, Tensor], quantisation: dict[str, Any]) -> Path:
    """Replace the weights of a release, and let its config say how they are stored."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return folder


def in_fp8(specimen: Specimen, folder: Path, block: tuple[int, int] | None = (16, 16)) -> Path:
    """Save a specimen as DeepSeek does: matrices of the blocks in FP8, each block of a matrix with a scale of its own."""
    source = release(specimen.model(3, dtype=torch.bfloat16), folder)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / WEIGHTS).items():
        if weight.ndim != 2 or "proj" not in name:
            tensors[name] = weight
            continue
        rows, columns = block or weight.shape
        grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        scale = torch.rand(grid, generator=torch.Generator().manual_seed(len(name))) * 0.01 + 0.001
        wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight.float() / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale if block else scale.reshape(())
    return packed(source, tensors, {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"})


def in_mxfp4(folder: Path) -> Path:
    """Save a gpt-oss as it is released: the experts' matrices as blocks of 32 numbers of 4 bits with a scale."""
    draw = torch.Generator().manual_seed(0)
    settings = BY_NAME["gpt_oss"].settings | {"hidden_size": 64, "intermediate_size": 64}
    source = release(Specimen("gpt_oss", "gpt_oss", settings).model(3, dtype=torch.bfloat16), folder)
    tensors = load_file(source / WEIGHTS)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=draw).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 126, shape, generator=draw).to(torch.uint8)
    return packed(
        source, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    )


def by_transformers(folder: Path, undone: Any) -> Tensor:
    """The logits of the model as transformers dequantises it on loading."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=undone)
    return logits(model.eval())


def assert_plain(source: Path, out: Path) -> PrunableCheckpoint:
    """Write the release that `source` stands for, and cut it."""
    write(opened(source), out)
    checkpoint = PrunableCheckpoint.open(out)
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.dtype == "bfloat16"
    cut_checkpoint(out, out.with_name("cut"), (1,))
    assert verify_cut(out, out.with_name("cut"), (1,)).max_difference == 0
    return checkpoint


@pytest.mark.parametrize("block", [(16, 16), None], ids=["blocks", "one scale"])
def test_fp8_is_read_as_transformers_reads_it(block: tuple[int, int] | None, tmp_path: Path) -> None:
    source = in_fp8(BY_NAME["qwen3"], tmp_path / "fp8", block)
    assert packing(source) == "fp8"
    assert_plain(source, tmp_path / "plain")
    undone = FineGrainedFP8Config(weight_block_size=block, dequantize=True)
    assert torch.equal(logits(load_model(tmp_path / "plain")), by_transformers(source, undone))


def test_fp8_blocks_need_not_fill_a_tensor(tmp_path: Path) -> None:
    """DeepSeek's latent projections are 576 high and have blocks of 128, which transformers refuses; experts are stored one by one."""
    source = in_fp8(BY_NAME["deepseek_v3"], tmp_path / "fp8", (20, 12))
    assert_plain(source, tmp_path / "plain")
    stored, plain = load_file(source / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS)
    name = "model.layers.2.mlp.experts.1.up_proj.weight"  # (16, 32)
    weight, scale = stored[name].float(), stored[f"{name}_scale_inv"]
    by_hand = [[weight[row, column] * scale[row // 20, column // 12] for column in range(32)] for row in range(16)]
    assert torch.equal(plain[name], torch.tensor(by_hand).bfloat16())


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    source = in_mxfp4(tmp_path / "mxfp4")
    assert packing(source) == "mxfp4"
    assert_plain(source, tmp_path / "plain")
    assert torch.equal(logits(load_model(tmp_path / "plain")), by_transformers(source, Mxfp4Config(dequantize=True)))


def test_a_release_in_full_precision_is_read_as_it_is(tmp_path: Path) -> None:
    source = release(BY_NAME["llama"].model(2), tmp_path)
    assert packing(source) is None
    assert opened(source) == PrunableCheckpoint.open(source)


def test_a_stage_that_is_given_one_refuses_it(tmp_path: Path) -> None:
    """Only the stage pin dequantises."""
    with pytest.raises(Refusal, match=r"the weights are quantised \(fp8\)"):
        PrunableCheckpoint.open(in_fp8(BY_NAME["qwen3"], tmp_path))


@pytest.mark.parametrize(
    ("scale", "said"),
    [(None, "has no scales"), (torch.ones(1, 3), "has scales of the shape"), (torch.ones(2, 2).half(), "in F16")],
)
def test_scales_that_do_not_fit_are_refused(scale: Tensor | None, said: str, tmp_path: Path) -> None:
    source = in_fp8(BY_NAME["qwen3"], tmp_path)
    tensors = load_file(source / WEIGHTS)
    name = next(name for name in tensors if name.endswith("k_proj.weight_scale_inv"))
    del tensors[name]
    save_file(tensors | ({name: scale} if scale is not None else {}), source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(Refusal, match=f"{name.removesuffix('_scale_inv')} .*{said}"):
        opened(source)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("field", ["base_model", "_name_or_path"])
def test_other_quantisations_are_refused_by_name(field: str, method: str, tmp_path: Path) -> None:
    source = release(BY_NAME["llama"].model(2), tmp_path)
    config = json.loads((source / "config.json").read_text()) | {field: "org/full"}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(
        Refusal, match=rf"quantised \({method}\): prune the full-precision release \(its config names org/full\)"
    ):
        opened(source)
