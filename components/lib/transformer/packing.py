"""Count the parameters of stored tensors, those of quantised checkpoints included.

A quantised checkpoint has as many parameters as the model it was made from. A packed tensor holds several parameters in each of its
numbers: they count one each. Tensors that only serve to unpack them (scales, zero points, group indices, lookup tables) are not
parameters. Neither are tensors of integers or booleans that are no weights, such as masks and position ids.

    format                     packed tensor          parameters in it
    GPTQ, AWQ                  `qweight`, int32       32 / bits a number
    compressed-tensors         `weight_packed`        8 · bytes / bits
    bitsandbytes, 4 bits       a uint8 tensor beside  2 a byte
                               its own `.absmax`
    MXFP4                      `*_blocks`, uint8      2 a byte
    FP8, int8                  none                   1 a number

compressed-tensors pads rows of a width that 32 / bits does not divide; the padding is counted. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from components.lib.errors import Refusal
from components.lib.transformer.families import Config

if TYPE_CHECKING:
    from components.lib.transformer.checkpoint import Stored

_PACKED = ("qweight", "weight_packed")
"""Names of packed tensors whose bits the config states."""

_NO_WEIGHTS = ("I64", "I32", "I16", "U64", "U32", "U16", "U8", "BOOL")
"""Types that hold no weights unless a quantisation packs them."""

_UNPACKING = re.compile(
    r"(^|\.)(qzeros|scales|zeros|g_idx|SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map"
    r"|weight_(scale|scale_inv|scale_2|global_scale|zero_point|shape|g_idx)"
    r"|(input|output)_(scale|global_scale|zero_point)|[qkv]_(scale|zero_point))$|\.quant_state\.|_scales$"
)
"""The ends of the names of tensors that serve to unpack others."""


def quantisation(config: Config) -> Mapping[str, Any] | None:
    """Return the quantisation that a config.json states, or None."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for name in ("quantization_config", "compression_config"):
            if isinstance(part.get(name), Mapping):
                return part[name]
    return None


def count_parameters(tensors: Mapping[str, Stored], config: Config) -> int:
    """Return how many parameters the tensors of a checkpoint hold, packed ones unpacked.

    Args:
        tensors: every tensor by its name.
        config: the checkpoint's config.json, which states the bits of GPTQ, AWQ and compressed-tensors.

    Raises:
        Refusal: a tensor is packed and the config does not state its bits.
    """
    stated = quantisation(config)
    bits = {name: packed for name in tensors if (packed := _packed_bits(name, tensors, stated))}
    quantised = stated is not None or bool(bits)

    def count(name: str, tensor: Stored) -> int:
        if name in bits:
            return 8 * tensor.size // bits[name]
        if tensor.dtype in _NO_WEIGHTS or (quantised and _UNPACKING.search(name)):
            return 0
        return prod(tensor.shape)

    return sum(count(name, tensor) for name, tensor in tensors.items())


def _packed_bits(name: str, tensors: Mapping[str, Stored], stated: Mapping[str, Any] | None) -> int | None:
    """Return the bits of one parameter in a packed tensor; None if the tensor is not packed."""
    module, _, last = name.rpartition(".")
    if f"{name}.absmax" in tensors:
        return 4 if tensors[name].dtype == "U8" else None
    if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        return 4
    if last not in _PACKED:
        return None
    bits = _stated_bits(module, stated or {})
    if not isinstance(bits, int) or not 0 < bits <= 32:
        raise Refusal(
            f"the weights of {module} are packed and config.json's quantization_config states {bits!r} bits for them: set its field bits to "
            "the number they were quantised to"
        )
    return bits


def _stated_bits(module: str, stated: Mapping[str, Any]) -> Any:
    """Return the bits that a quantisation states for a module: its own (GPTQModel's `dynamic`, a group's target), or everyone's."""
    for pattern, own in (stated.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module) and "bits" in own:
            return own["bits"]
    everyone = stated.get("bits", stated.get("w_bit"))
    for group in (stated.get("config_groups") or {}).values():
        bits = (group.get("weights") or {}).get("num_bits")
        for target in group.get("targets", ()):
            if _is_module(target, module):
                return bits
            everyone = bits if everyone is None else everyone  # a class, such as Linear
    return everyone


def _is_module(target: str, module: str) -> bool:
    """Say whether a target of compressed-tensors, a name or `re:` and an expression, is this module."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return module == target or module.endswith(f".{target}")
