"""Fake quantised checkpoints in every supported format, made of zeros: what the tests of counting and measuring open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Packed = Iterator[tuple[str, Tensor]]
Packing = Callable[[str, int, int], Packed]
"""(module, rows, columns of its weight) → the tensors that a quantisation stores of it."""

FLOAT8 = torch.float8_e4m3fn


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def gptq(bits: int) -> Packing:
    def pack(module: str, rows: int, columns: int) -> Packed:
        yield f"{module}.qweight", zeros(columns * bits // 32, rows, dtype=torch.int32)
        yield f"{module}.qzeros", zeros(columns // 16, rows * bits // 32, dtype=torch.int32)
        yield f"{module}.scales", zeros(columns // 16, rows)
        yield f"{module}.g_idx", zeros(columns, dtype=torch.int32)

    return pack


def awq(module: str, rows: int, columns: int) -> Packed:
    yield f"{module}.qweight", zeros(columns, rows // 8, dtype=torch.int32)
    yield f"{module}.qzeros", zeros(columns // 16, rows // 8, dtype=torch.int32)
    yield f"{module}.scales", zeros(columns // 16, rows)


def compressed(bits: int) -> Packing:
    def pack(module: str, rows: int, columns: int) -> Packed:
        yield f"{module}.weight_packed", zeros(rows, columns * bits // 32, dtype=torch.int32)
        yield f"{module}.weight_scale", zeros(rows, columns // 16)
        yield f"{module}.weight_shape", zeros(2, dtype=torch.int64)

    return pack


def mixed(module: str, rows: int, columns: int) -> Packed:
    """The down projections of 8 bits, the rest of 4."""
    return compressed(8 if module.endswith("down_proj") else 4)(module, rows, columns)


def mixed_gptq(module: str, rows: int, columns: int) -> Packed:
    return gptq(8 if module.endswith("down_proj") else 4)(module, rows, columns)


def bitsandbytes4(module: str, rows: int, columns: int) -> Packed:
    yield f"{module}.weight", zeros(rows * columns // 2, 1, dtype=torch.uint8)
    yield f"{module}.weight.absmax", zeros(rows * columns // 16, dtype=torch.uint8)
    yield f"{module}.weight.nested_absmax", zeros(1)
    yield f"{module}.weight.quant_map", zeros(16)
    yield f"{module}.weight.quant_state.bitsandbytes__nf4", zeros(90, dtype=torch.uint8)


def bitsandbytes8(module: str, rows: int, columns: int) -> Packed:
    yield f"{module}.weight", zeros(rows, columns, dtype=torch.int8)
    yield f"{module}.SCB", zeros(rows)
    yield f"{module}.weight_format", zeros(dtype=torch.uint8)


def fp8(module: str, rows: int, columns: int) -> Packed:
    yield f"{module}.weight", zeros(rows, columns, dtype=FLOAT8)
    yield f"{module}.weight_scale_inv", zeros(1, 1)


def mxfp4(module: str, rows: int, columns: int) -> Packed:
    yield f"{module}_blocks", zeros(rows, columns // 16, 8, dtype=torch.uint8)
    yield f"{module}_scales", zeros(rows, columns // 16, dtype=torch.uint8)


def group(bits: int, *targets: str) -> dict[str, Any]:
    return {"weights": {"num_bits": bits}, "targets": list(targets)}


FORMATS: dict[str, tuple[Packing, dict[str, Any] | None]] = {
    "gptq-4": (gptq(4), {"quant_method": "gptq", "bits": 4}),
    "gptq-8": (gptq(8), {"quant_method": "gptq", "bits": 8}),
    "gptq-mixed": (mixed_gptq, {"quant_method": "gptq", "bits": 4, "dynamic": {r"+:.*\.down_proj": {"bits": 8}}}),
    "awq": (awq, {"quant_method": "awq", "bits": 4}),
    "awq-old": (awq, {"quant_method": "awq", "w_bit": 4}),
    "compressed-4": (compressed(4), {"config_groups": {"group_0": group(4, "Linear")}}),
    "compressed-mixed": (mixed, {"config_groups": {"a": group(4, "Linear"), "b": group(8, r"re:.*down_proj$")}}),
    "bitsandbytes-4": (bitsandbytes4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes-4-unsaid": (bitsandbytes4, None),
    "bitsandbytes-8": (bitsandbytes8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8": (fp8, {"quant_method": "fp8"}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
}


def quantise(folder: Path, packing: Packing, config: dict[str, Any] | None) -> Path:
    """Put packed zeros in place of the projections of a release's blocks."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors |= packing(name.removesuffix(".weight"), *tensor.shape)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | ({"quantization_config": config} if config else {})))
    return folder
