"""The channels of a family: which dimension of which tensor belongs to which axis.

Channels are removed along three axes: *hidden*, the width of the residual stream; *ffn*, the intermediate width; *heads*, whole
key-value groups, each a key and a value head with the query heads that read them. Whole *experts* are a fourth axis, which no layout
describes (`experts.py`). A layout names, for every module that has
parameters, the segments of each dimension:

    hidden    one channel of the residual stream each
    ffn       one intermediate channel each
    query     the query heads, a group after the other
    key       the key (or value) heads
    qkv       query, key and value interleaved group by group, as GPT-NeoX stores them
    any       rows that belong to no axis: the vocabulary, positions, the width of one head

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from components.lib.errors import Refusal

Axis = Literal["hidden", "ffn", "heads", "experts"]
Part = Literal["attention", "ffn", "rest"]
Config = Mapping[str, Any]


def text_part(config: Config) -> Config:
    """Return the part of a config that describes the text model: a wrapper's `text_config`, or the whole config."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def with_text(config: Config, text: Config) -> dict[str, Any]:
    """Return a config with another text model: in its `text_config` if it is a wrapper's, or in its place."""
    return dict(text) if text_part(config) is config else {**config, "text_config": dict(text)}


_AXIS: Mapping[str, Axis] = {"hidden": "hidden", "ffn": "ffn", "query": "heads", "key": "heads", "qkv": "heads"}


@dataclass(frozen=True)
class Widths:
    """The widths that a config states."""

    hidden: int
    ffn: int
    heads: int
    """Query heads of a layer."""
    groups: int
    """Key-value heads, each with heads / groups query heads."""
    head: int
    """Width of one head."""
    experts: int = 0
    """Routed experts of a layer, if its family can lose some."""

    def of(self, axis: Axis) -> int:
        """How many channels an axis has; of heads, the groups."""
        return {"hidden": self.hidden, "ffn": self.ffn, "heads": self.groups, "experts": self.experts}[axis]

    def unit(self, segment: str) -> int:
        """How many rows of a segment belong to one channel of its axis."""
        shared = self.heads // self.groups
        return {"query": shared * self.head, "key": self.head, "qkv": (shared + 2) * self.head}.get(segment, 1)

    def size(self, segment: str) -> int:
        """How many rows a segment has; 0 for `any`, of which nothing is known."""
        axis = axis_of(segment)
        return self.of(axis) * self.unit(segment) if axis else 0


@dataclass(frozen=True)
class Layout:
    """The layout of a family: a part of its row in `families.FAMILIES`."""

    modules: Mapping[str, str]
    """The end of a module's path → the segments of its weight's dimensions, those of the output first. A bias has the output's."""
    hidden: tuple[str, ...] = ("hidden_size",)
    """The config fields that state the hidden width; the first is read."""
    ffn: str = "intermediate_size"
    heads: str = "num_attention_heads"
    groups: str | None = "num_key_value_heads"
    """None if every query head has a key head of its own."""
    head: str | None = "head_dim"
    """None if the transformers class takes hidden / heads for a head's width: hidden and heads then shrink together."""
    transposed: bool = False
    """Whether the blocks' weights are stored input first (GPT-2's Conv1D)."""
    divides: bool = False
    """Whether the config class wants the hidden width to be a multiple of the number of heads, whatever a head's width is."""
    norm_first: str | None = None
    """The config field that is false if the norms stand behind the residual sums (OPT-350m); None if the family has no such form."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by the square root of the hidden width (Gemma)."""
    within: re.Pattern[str] | None = None
    """Matches the names that the layout speaks of, if those are not all: a wrapper's other towers have modules of the same names."""

    def widths(self, config: Config) -> Widths:
        """Return the widths that a config.json states, defaults of the transformers class included."""
        config = text_part(config)
        hidden, heads = config[self.hidden[0]], config[self.heads]
        groups = (config.get(self.groups) if self.groups else None) or heads
        head = (config.get(self.head) if self.head else None) or hidden // heads
        return Widths(hidden, config.get(self.ffn) or 4 * hidden, heads, groups, head)

    def norms_after(self, config: Config) -> bool:
        """Say whether a norm stands between a branch's last projection and the residual stream, or behind their sum."""
        behind_sum = self.norm_first is not None and text_part(config).get(self.norm_first) is False
        return behind_sum or not BRANCH_NORMS.isdisjoint(self.modules)

    def dimensions(self, tensor: str) -> list[list[str]]:
        """Return the segments of each dimension of a tensor by its name, as it is stored.

        Raises:
            Refusal: the layout does not know the tensor.
        """
        module, _, kind = tensor.rpartition(".")
        dimensions = self.segments(module)
        if dimensions is None:
            raise Refusal(
                f"the layout in components/lib/transformer/families.py does not say which channels the tensor {tensor} holds: add its "
                "module there (docs/families.md shows how), or remove layers instead"
            )
        if kind == "bias":
            return dimensions[:1]
        return dimensions[::-1] if self.input_first(dimensions) else dimensions

    def input_first(self, segments: Sequence[Sequence[str]]) -> bool:
        """Say whether a weight with these `segments` is stored input first."""
        # An embedding is no Conv1D, and every other weight of two dimensions lies in a block.
        return self.transposed and len(segments) == 2 and segments[0] != ["any"]

    def segments(self, module: str) -> list[list[str]] | None:
        """Return the segments of a module's output and, if its weight has two dimensions, of its input; None for an unknown path."""
        if not self.speaks_of(f"{module}."):
            return None
        found = [known for known in self.modules if module == known or module.endswith(f".{known}")]
        return [part.split("+") for part in self.modules[max(found, key=len)].split()] if found else None

    def speaks_of(self, name: str) -> bool:
        """Say whether a tensor may hold channels of the text model."""
        return self.within is None or self.within.match(name) is not None

    def part(self, tensor: str) -> Part:
        """Return the part of the model that the paper (DReSS, arXiv 2501.17905) counts a tensor to."""
        segments = {segment for dimension in self.dimensions(tensor) for segment in dimension}
        if segments & {"query", "key", "qkv"}:
            return "attention"
        return "ffn" if "ffn" in segments else "rest"


BRANCH_NORMS = frozenset(("post_feedforward_layernorm", "post_mlp_layernorm", "post_norm2"))
"""The norms between an MLP's last projection and the residual stream, in the families that have one."""


def axis_of(segment: str) -> Axis | None:
    """Return the axis that a segment's rows belong to, or None."""
    return _AXIS.get(segment)


ATTENTION = {"q_proj": "query hidden", "k_proj": "key hidden", "v_proj": "key hidden", "o_proj": "hidden query"}
GATED = {"gate_proj": "ffn hidden", "up_proj": "ffn hidden", "down_proj": "hidden ffn"}
UNGATED = {"up_proj": "ffn hidden", "down_proj": "hidden ffn"}
FUSED = {"gate_up_proj": "ffn+ffn hidden", "down_proj": "hidden ffn"}
NORMS = {"input_layernorm": "hidden", "post_attention_layernorm": "hidden", "norm": "hidden"}
ENDS = {"embed_tokens": "any hidden", "lm_head": "any hidden"}
POST_NORMS = {"post_attention_layernorm": "hidden", "post_feedforward_layernorm": "hidden", "norm": "hidden"}
HEAD_NORMS = {"q_norm": "any", "k_norm": "any"}
SANDWICH = {"pre_feedforward_layernorm": "hidden", "post_feedforward_layernorm": "hidden"}
LLAMA = Layout({**ATTENTION, **GATED, **NORMS, **ENDS})
