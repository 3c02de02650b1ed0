"""A Qwen3.5 as llama.cpp writes it to a GGUF file: names, norms with their 1, value heads in another order, and a head for multi-token prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
TILED = ("A_log", "dt_bias", "in_proj_a", "in_proj_b", "in_proj_z", "in_proj_qkv", "conv1d", "out_proj")
"""The parameters with a row, or a column, for each value head."""


def settings(model: PreTrainedModel, heads: int) -> dict[str, Any]:
    """Return the settings of the file, but for those that every architecture has; `heads` blocks for multi-token prediction are counted as layers."""
    config = model.config
    return {
        "block_count": config.num_hidden_layers + heads,
        "nextn_predict_layers": heads,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
        "rope.dimension_sections": [2, 1, 1, 0],  # of text alone, every division gives the same
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }


def renamed(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the model's tensors under their names in the file."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if any(part in name for part in TILED):
            tensor = _tiled(model, name, tensor)
        if "norm" in name and "linear_attn" not in name:
            tensor = tensor + 1
        if name.endswith("conv1d.weight"):
            tensor = tensor.squeeze(1)
        if name.endswith("A_log"):
            tensor = -torch.exp(tensor)
        found[_name(name)] = tensor.contiguous()
    return found


def _name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    special = {"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"}
    module, _, last = rest.rpartition(".")
    return f"blk.{layer}.{special.get(rest) or f'{NAMES[module]}.{last}'}"


def _tiled(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Put the value heads, which stand key head by key head, one of each key head after the other."""
    config = model.config
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    width = config.linear_value_head_dim if any(part in name for part in TILED[4:]) else 1
    rows = torch.arange(values * width).reshape(keys, values // keys, width).transpose(0, 1).reshape(-1)
    if "out_proj" in name:
        return tensor[:, rows]
    before = 2 * keys * config.linear_key_head_dim if "in_proj_qkv" in name or "conv1d" in name else 0
    return torch.cat([tensor[:before], tensor[before:][rows]])


def head(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a few tensors of a head for multi-token prediction, in the block behind the last."""
    width, last = model.config.hidden_size, model.config.num_hidden_layers
    return {
        f"blk.{last}.nextn.eh_proj.weight": torch.ones(width, 2 * width),
        f"blk.{last}.attn_q.weight": torch.ones(width, width),
    }
