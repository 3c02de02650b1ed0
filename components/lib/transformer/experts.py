"""The routed experts of a mixture: how many a config states, which tensors hold them, and the config of the model without some.

transformers gives every mixture the same two modules, a router and its experts; checkpoints store an expert's tensors each for itself
(`….experts.7.w1.weight`) or all in one (`….experts.gate_up_proj`). An expert that is removed takes its tensors, its row of the router and
its correction of the choice with it. Every layer that has experts keeps as many.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.lib.errors import Refusal
from components.lib.transformer.family import Config, Family
from components.lib.transformer.layout import text_part

LEAST = 2
"""Experts that stay in each group at least: routers add the scores of a group's two best."""

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_GROUPS = ("n_group", "num_expert_group")
_CHOSEN_GROUPS = ("topk_group",)

_NUMBERED = re.compile(r"\.experts\.(\d+)\.")
_STACKED = re.compile(
    r"\.(?:gate|router)(?:\.(?:gate|layer|wg))?\.(?:weight|bias)$"
    r"|\.(?:e_score_correction_bias|expert_bias)$"
    r"|\.experts\.\w+(?:\.weight)?$"
    r"|\.block_sparse_moe\.(?:input|output)_linear\.weight$"
)


@dataclass(frozen=True)
class Experts:
    """The experts that a config states."""

    count: int
    """Experts of a layer."""
    chosen: int
    """Experts that a token is routed to."""
    groups: int = 1
    """Groups of equal size, of which a token is routed to the experts of some."""
    chosen_groups: int = 1

    def possible(self) -> range:
        """Return the numbers of experts that can stay: as many in each group."""
        step = self.groups
        return range(LEAST * step, self.count, step)

    def chosen_of(self, kept: int) -> int:
        """Return how many experts a token is routed to if `kept` stay: as many as before, if there are so many in the chosen groups."""
        return min(self.chosen, kept // self.groups * self.chosen_groups)


def experts_of(family: Family, config: Config) -> Experts:
    """Return the experts that a config.json states.

    Raises:
        Refusal: no expert of the family can be removed; the config states no number of experts, two, or none at all.
    """
    if not family.experts:
        reason = (
            family.experts_stay
            or "has no experts, or none that its row of components/lib/transformer/families.py speaks of"
        )
        raise Refusal(
            f"no experts can be removed from {family.title}, which {reason}: name another axis, or remove layers"
        )
    text = text_part(config)
    counts = {name: text[name] for name in _COUNTS if text.get(name) is not None}
    chosen = _first(text, _CHOSEN)
    if len(set(counts.values())) != 1 or not all(counts.values()) or chosen is None:
        raise Refusal(
            f"config.json states {counts or 'no number'} of experts and {chosen} for a token, but {family.title} loses experts if every layer "
            f"has the same number: write one ({_COUNTS[0]}, and {_CHOSEN[0]}), or remove layers"
        )
    groups = _first(text, _GROUPS) or 1
    return Experts(next(iter(counts.values())), chosen, groups, _first(text, _CHOSEN_GROUPS) or 1 if groups > 1 else 1)


def _first(text: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((text[name] for name in names if isinstance(text.get(name), int)), None)


def fewer_experts(family: Family, config: Config, removed: int) -> dict[str, int]:
    """Return the fields of the text model's config that state other numbers when each layer has lost `removed` experts."""
    experts, text = experts_of(family, config), text_part(config)
    kept = experts.count - removed
    fields = dict.fromkeys((name for name in _COUNTS if text.get(name) is not None), kept)
    return fields | dict.fromkeys(
        (name for name in _CHOSEN if isinstance(text.get(name), int)), experts.chosen_of(kept)
    )


def without_expert(tensor: str, removed: Sequence[int]) -> str | None:
    """Return the name that a block's tensor has in the cut model; None if it belongs to a removed expert.

    >>> [without_expert(f"model.layers.0.mlp.experts.{number}.up_proj.weight", (1,)) for number in range(3)]
    ['model.layers.0.mlp.experts.0.up_proj.weight', None, 'model.layers.0.mlp.experts.1.up_proj.weight']
    """
    found = _NUMBERED.search(tensor)
    if found is None:
        return tensor
    number = int(found[1])
    if number in removed:
        return None
    new = number - sum(other < number for other in removed)
    return f"{tensor[: found.start(1)]}{new}{tensor[found.end(1) :]}"


def kept_experts(experts: int, tensor: str, shape: Sequence[int], removed: Sequence[int]) -> list[list[int] | None]:
    """Return, for each dimension of a block's tensor, the indices that stay if experts are removed, or None if all stay.

    Args:
        experts: how many experts the layer has.
        tensor: its name, as it is stored.
        shape: its shape.
        removed: the experts to remove.

    Raises:
        Refusal: by its name the tensor holds something of every expert, and no dimension is as long as there are experts.
    """
    kept: list[list[int] | None] = [None] * len(shape)
    if not removed or not _STACKED.search(tensor) or _NUMBERED.search(tensor):
        return kept
    dimension = along_experts(experts, shape)
    if dimension is None:
        raise Refusal(
            f"the tensor {tensor} has the shape {tuple(shape)}, but the config states {experts} experts: get the release again, or remove layers"
        )
    kept[dimension] = [expert for expert in range(experts) if expert not in removed]
    return kept


def along_experts(experts: int, shape: Sequence[int]) -> int | None:
    """Return the dimension along which a tensor of a router, or of all experts, counts the experts: the first, or that of a single row."""
    if shape and shape[0] == experts:
        return 0
    return 1 if len(shape) == 2 and shape[0] == 1 and shape[1] == experts else None
