"""A release whose weights are stored in FP8 or MXFP4, read as bf16: tensor by tensor, so that the model is never held whole.

A release in a GGUF file is opened here too, and unpacked by `gguf.py`.

    FP8      W = F · s, F in float8_e4m3fn, one scale s for each block of `weight_block_size`, or for the whole tensor (`….weight_scale_inv`)
    MXFP4    W = F · 2^(s − 127), F in float4_e2m1, two a byte, one scale for each 32 (`…_blocks`, `…_scales`), as gpt-oss stores its experts

Products are taken in fp32 and rounded to bf16 once, as transformers does. transformers itself refuses FP8 blocks that do not fill a tensor,
which DeepSeek has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lib.errors import Refusal
from components.lib.transformer.checkpoint import Checkpoint, PrunableCheckpoint, Stored, checked
from components.lib.transformer.families import full_precision, packing_of, quantisation_of
from components.lib.transformer.gguf import gguf_of, promised

if TYPE_CHECKING:
    from torch import Tensor

_SCALE, _ACTIVATIONS = "_scale_inv", ("activation_scale", "input_scale")
_BLOCKS, _SCALES = "_blocks", "_scales"


def opened(folder: Path) -> PrunableCheckpoint:
    """Open a release as `PrunableCheckpoint.open` does; one in FP8 or MXFP4 as the bf16 model that its tensors stand for.

    Args:
        folder: the release; a GGUF file, or a folder that holds one, is opened as the checkpoint that it is unpacked to, without its weights.

    Raises:
        Refusal: `PrunableCheckpoint.open` or `promised` refuses it, or a tensor has no scales that fit it.
    """
    file = gguf_of(folder)
    if file is not None:
        return promised(file).checkpoint
    stored = Checkpoint.open(folder)
    packing = packing_of(stored.config)
    if packing is None:
        return PrunableCheckpoint.open(folder)
    config, family = checked(full_precision(stored.config))
    tensors = _from_fp8(stored.config, stored.tensors) if packing == "fp8" else _from_mxfp4(stored.tensors)
    return PrunableCheckpoint.of(folder, config, family, tensors)


def packing(folder: Path) -> str | None:
    """Return how the weights of a release are stored, if `opened` dequantises them: fp8 or mxfp4; None for all others."""
    return packing_of(Checkpoint.open(folder).config)


@dataclass(frozen=True)
class Packed(Stored):
    """A tensor in bf16 whose bytes are computed from a packed one and its scales."""

    weight: Stored
    scale: Stored
    block: tuple[int, int] | None = None
    """Rows and columns for each scale of an FP8 tensor; None for one scale in all, and for MXFP4."""

    def pieces(self, length: int = 1 << 24) -> Iterator[bytes]:
        """Yield the bytes in bf16, in one piece."""
        import torch

        yield self.value().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()

    def value(self) -> Tensor:
        """Return the tensor, in fp32 or bf16."""
        weight, scale = self.weight.read(), self.scale.read()
        if self.weight.dtype == "U8":
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            return convert_moe_packed_tensors(weight, scale)
        scale = scale.float()
        if self.block is not None:
            rows, columns = self.shape[-2:]
            for dimension, (step, size) in ((-2, (self.block[0], rows)), (-1, (self.block[1], columns))):
                scale = scale.repeat_interleave(step, dimension).narrow(dimension, 0, size)
        return weight.float() * scale


def _packed(shape: tuple[int, ...], weight: Stored, scale: Stored, block: tuple[int, int] | None = None) -> Packed:
    return Packed(weight.file, "BF16", shape, weight.start, 2 * prod(shape), weight=weight, scale=scale, block=block)


def _from_fp8(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    size: Sequence[int] = quantisation_of(config).get("weight_block_size") or ()
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if name.endswith((_SCALE, *_ACTIVATIONS)):
            continue
        if tensor.dtype != "F8_E4M3":
            found[name] = tensor
            continue
        scale = tensors.get(f"{name}{_SCALE}")
        if scale is not None and prod(scale.shape) == 1:
            found[name] = _packed(tensor.shape, tensor, replace(scale, shape=()))
            continue
        grid = tuple(ceil(length / step) for length, step in zip(tensor.shape[-2:], size, strict=False))
        if scale is None or scale.dtype not in ("F32", "BF16", "F8_E8M0") or scale.shape[-2:] != grid:
            stated = "no scales" if scale is None else f"scales of the shape {scale.shape} in {scale.dtype}"
            raise Refusal(
                f"the FP8 tensor {name} of the shape {tensor.shape} has {stated}, and config.json's weight_block_size is {list(size)}: name the "
                "full-precision release"
            )
        found[name] = _packed(tensor.shape, tensor, scale, (size[0], size[1]))
    return found


def _from_mxfp4(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        base = name.removesuffix(_BLOCKS)
        if name.endswith(_SCALES) and f"{name.removesuffix(_SCALES)}{_BLOCKS}" in tensors:
            continue
        if base == name:
            found[name] = tensor
            continue
        scale = tensors.get(f"{base}{_SCALES}")
        if scale is None or tensor.dtype != "U8" or scale.shape != tensor.shape[:-1] or len(tensor.shape) != 4:
            raise Refusal(
                f"the MXFP4 tensor {name} of the shape {tensor.shape} has no scales that fit it: name the full-precision release"
            )
        experts, rows, groups, packed = tensor.shape
        # transformers keeps these matrices input first.
        found[base] = _packed((experts, 2 * groups * packed, rows), tensor, scale)
    return found
