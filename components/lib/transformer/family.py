"""One family of models: the type of a row of the table, and the rules that keep per-layer config fields true after a cut.

Nothing here imports torch or transformers, so that a refusal is immediate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import Any

from components.lib.errors import Refusal
from components.lib.transformer.layout import LLAMA, Layout, text_part

Config = Mapping[str, Any]
"""The mapping of a config.json."""

GONE = object()
"""What a rule returns for a field that the cut config no longer has."""

HEADS = "num_nextn_predict_layers"
"""The config field that counts the heads for multi-token prediction whose tensors are blocks beyond the layers' count."""

Rule = Callable[[Config, str, Sequence[int]], Any]
"""(config, field, indices of the layers that stay, ascending) → the field's value in the cut config, or GONE."""


def one_each(config: Config, field: str, kept: Sequence[int]) -> list[Any]:
    """A list with one entry a layer, such as `layer_types`."""
    return [config[field][layer] for layer in kept]


def indices(config: Config, field: str, kept: Sequence[int]) -> list[int]:
    """A list of layer indices."""
    return [new for new, old in enumerate(kept) if old in config[field]]


def leading(config: Config, field: str, kept: Sequence[int]) -> int:
    """A number of layers counted from the first, such as `max_window_layers`."""
    return sum(layer < config[field] for layer in kept)


def keyed(config: Config, field: str, kept: Sequence[int]) -> dict[str, Any]:
    """A mapping from layer indices (`"05"` too) to settings, such as `per_layer_config`."""
    by_layer = {int(layer): settings for layer, settings in config[field].items()}
    return {str(new): by_layer[old] for new, old in enumerate(kept) if old in by_layer}


def letters(config: Config, field: str, kept: Sequence[int]) -> str:
    """A string with one letter a layer, such as `hybrid_override_pattern`."""
    return "".join(config[field][layer] for layer in kept)


def one_each_if_listed(config: Config, field: str, kept: Sequence[int]) -> Any:
    """A value for all layers, or a list with one entry a layer, such as Hunyuan's `num_experts`."""
    return one_each(config, field, kept) if isinstance(config[field], list) else config[field]


def repeated(config: Config, field: str, kept: Sequence[int]) -> list[Any]:
    """A list that the config class repeats until it is as long as the model, such as RecurrentGemma's `block_types`."""
    return [config[field][layer % len(config[field])] for layer in kept]


def spelled_out(config: Config, field: str, kept: Sequence[int]) -> Any:
    """A period or a count from which the config class makes a list if there is none: after a cut only the list is true."""
    return GONE


def first_sparse(config: Config, field: str, kept: Sequence[int]) -> int:
    """The index of the first sparse layer, such as ERNIE's `moe_layer_start_index`."""
    return sum(layer < config[field] for layer in kept)


def last_sparse(config: Config, field: str, kept: Sequence[int]) -> int:
    """The index of the last sparse layer, such as ERNIE's `moe_layer_end_index`; -1 stands for the last layer."""
    last = config[field]
    return last if last < 0 else sum(layer <= last for layer in kept) - 1


def counted_from_one(config: Config, field: str, kept: Sequence[int]) -> dict[str, Any]:
    """Kimi's `linear_attn_config`, whose lists `full_attn_layers` and `kda_layers` count the layers from 1."""

    def renumbered(value: Any) -> Any:
        return [new + 1 for new, old in enumerate(kept) if old + 1 in value]

    lists = ("full_attn_layers", "kda_layers")
    return {name: renumbered(value) if name in lists else value for name, value in config[field].items()}


def scaled_by_depth(config: Config, field: str, kept: Sequence[int]) -> float:
    """A number that is divided by the square root of the count of layers, such as MiniCPM3's `scale_depth`: the quotient stays."""
    return config[field] * sqrt(len(kept) / config["num_hidden_layers"])


def periodic(config: Config, field: str, kept: Sequence[int]) -> int:
    """A period or its offset, such as Jamba's `attn_layer_period` and `attn_layer_offset`, by which every n-th layer is of a kind.

    Experts are on no layer if there is one alone.

    Raises:
        Refusal: the layers of that kind that stay are not every n-th.
    """
    kind, part = field.rsplit("_", 1)
    period, offset = config[f"{kind}_period"], config[f"{kind}_offset"]
    if kind == "expert_layer" and config.get("num_experts") == 1:
        return config[field]
    places = [new for new, old in enumerate(kept) if old % period == offset]
    first, count = places[0] if places else len(kept), len(kept)
    found = places[1] - first if len(places) > 1 else max(first + 1, count - first)
    if first >= found or places != list(range(first, count, found)):
        raise Refusal(
            f"config.json's {kind}_period makes every {period}th layer of a kind, and of the layers that would stay none of that kind are so: "
            f"remove the last layers (methods.last), or runs of {period} layers"
        )
    return {"period": found, "offset": first}[part]


def no_heads(config: Config, field: str, kept: Sequence[int]) -> int:
    """The number of heads for multi-token prediction: 0, since their tensors are dropped."""
    return 0


def unchanged(config: Config, field: str, kept: Sequence[int]) -> Any:
    """A field whose name speaks of layers but whose value does not depend on which layers there are."""
    return config[field]


def dense_layers(config: Config, field: str, kept: Sequence[int]) -> list[int]:
    """Qwen-MoE's `mlp_only_layers`: layer i is dense if it is listed, or if i + 1 is no multiple of the sparse step."""
    step = config.get("decoder_sparse_step") or 1
    return [new for new, old in enumerate(kept) if old in config[field] or (old + 1) % step]


def every_layer(config: Config, field: str, kept: Sequence[int]) -> int:
    """Qwen-MoE's `decoder_sparse_step`: 1, since `mlp_only_layers` names every dense layer of the cut model."""
    return 1


@dataclass(frozen=True)
class Family:
    """One row: the model families that share a `model_type`."""

    model_type: str
    title: str
    """The names people know it by."""
    blocks: str = "model.layers"
    """Dotted path of the blocks' `ModuleList` in the causal language model."""
    stored: tuple[str, ...] = ()
    """Their other paths in checkpoints."""
    tuples: bool = False
    """Whether a block returns a tuple whose first item is the hidden states, and not the hidden states alone."""
    count: str = "num_hidden_layers"
    """The config field that counts the layers."""
    counted_by: str | None = None
    """The per-layer list whose length counts the layers if the config has no `count`."""
    per_layer: Mapping[str, Rule] = field(default_factory=dict)
    """The config fields that speak of single layers, each with its rule."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Config fields that are refused when they are set, each with the reason."""
    required: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Config fields that must have one value, each with that value and the reason."""
    ignored: tuple[str, ...] = ()
    """The prefixes of tensors that transformers ignores, such as the heads for multi-token prediction: a cut drops them."""
    layout: Layout | None = LLAMA
    """Where its channels lie; None if only layers can be removed."""
    fixed: Callable[[Config, int], Sequence[int]] | None = None
    """(config, number of layers) → the layers that cannot be removed."""
    why_fixed: str = ""
    """Why they cannot."""
    wraps: str = ""
    """The `model_type` of the text model, if the family wraps it with towers for other inputs (`wrappers.py`)."""
    tower: str = ""
    """Dotted path of the text model in a wrapper."""
    layers_only: str = ""
    """Why channels cannot be removed, such as `is a mixture of experts`; empty if the layout is only not written down yet."""
    experts: bool = False
    """Whether experts can be removed: a router returns the weights and indices of a token's experts, and every layer has as many."""
    experts_stay: str = ""
    """Why a mixture cannot lose experts, such as `routes its attention too`."""

    def layers(self, config: Config) -> int:
        """The number of layers the config states. Raises Refusal if it states none."""
        config = text_part(config)
        count = config.get(self.count)
        if count is None and self.counted_by and isinstance(config.get(self.counted_by), list):
            count = len(config[self.counted_by])
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise Refusal(
                f"config.json's {self.count} is {count!r}, but {self.title} counts its layers there: set it to the number of layers"
            )
        return count

    def block_of(self, tensor: str) -> tuple[int, int, int] | None:
        """Return the block index in a tensor's name and where its digits start and end, or None for a tensor outside the blocks.

        Checkpoints of the bare base model leave the first part of the path out (`h.0.…` for `transformer.h.0.…`).
        """
        found = next(filter(None, (pattern.match(tensor) for pattern in self.patterns)), None)
        return (int(found[1]), *found.span(1)) if found else None

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """Match the names of the blocks' tensors, with a group that is the block's index."""
        parts = (path.split(".", 1) for path in (self.blocks, *self.stored))
        return tuple(re.compile(rf"(?:{re.escape(first)}\.)?{re.escape(rest)}\.(\d+)\.") for first, rest in parts)

    def removable(self, config: Config) -> list[int]:
        """Return the indices of the layers that can be removed."""
        layers = self.layers(config)
        fixed = self.fixed(config, layers) if self.fixed else ()
        return [layer for layer in range(layers) if layer not in fixed]

    def alone(self, tensor: str) -> str | None:
        """Return the name that a wrapper's tensor has in its text model saved alone; None for one of the other towers."""
        inside = self.blocks.removeprefix(self.tower)  # .layers
        towers = [path.removesuffix(inside) for path in (self.blocks, *self.stored)]
        for tower in towers:
            if tensor.startswith(f"{tower}."):
                return f"model.{tensor.removeprefix(f'{tower}.')}"
        return "lm_head.weight" if tensor in ("lm_head.weight", "language_model.lm_head.weight") else None

    def ignores(self, tensor: str, config: Config) -> bool:
        """Say whether transformers ignores a tensor: it belongs to a head for multi-token prediction.

        Such heads have names of their own (`mtp.…`), or are blocks beyond the count (`model.layers.61.…` of 61 layers).
        """
        if tensor.startswith(self.ignored):
            return True
        block = self.block_of(tensor)
        return block is not None and 0 <= block[0] - self.layers(config) < (text_part(config).get(HEADS) or 0)
