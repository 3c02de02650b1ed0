"""Channels gated from 1 to 0, by hooks: no copied `forward`, any family with a layout.

A channel is gated where it is read. Intermediate channels and heads are read by one projection each, so that a gate of 0 on its
input is exactly their removal. The residual stream is read through norms, and these do more than read: RMSNorm and LayerNorm
count the channels that they average over, and Gemma scales its embedding by the root of the width. So with a gate of 0

    the model computes the same as the cut model: every norm averages over the channels that stay, and outputs 0 in all others,

and between 1 and 0 a norm's output is g · norm(x) + (1 − g) · norm(the channels of x that stay).

An expert is gated where it is chosen. The router is asked twice, among all experts and, with the rows of its weight that stay, among those
that stay; both answers go to the experts, whose output is a sum weighted by the router:

    g · Σ_{e ∈ top(all)} w_e(x) · E_e(x)  +  (1 − g) · Σ_{e ∈ top(stay)} w'_e(x) · E_e(x)

With a gate of 0 the second sum alone is computed, which is what the cut model computes, whatever the router does to its scores:
softmax or sigmoid, normalised or not, corrections of the choice, groups.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from components.lib.transformer.channels import kept_indices, layout_of
from components.lib.transformer.experts import along_experts, experts_of
from components.lib.transformer.gates import family_in, unwrapped
from components.lib.transformer.selection import Channels


@contextmanager
def narrowed(model: nn.Module, channels: Channels, gate: float = 0.0) -> Iterator[None]:
    """Gate channels wherever they are read, and experts wherever they are chosen.

    A gate of 1 leaves the model as it is, 0 gives the output of the cut model.

    Nothing is faster: the channels are still computed. Nests with the contexts of `gates.py`, leaves the model as it found it,
    and may be opened on a model that has peft adapters.

    Args:
        model: a causal language model of a family with a layout, or of one that can lose experts.
        channels: the channels and experts to gate.
        gate: between 0 and 1.
    """
    with ExitStack() as stack:
        if channels.narrow and gate != 1.0:
            for module, kept, scale in readers(model, channels):
                stack.callback(_gated(module, kept, gate, scale).remove)
        if channels.experts and gate != 1.0:
            for layer, mixture in mixtures(model).items():
                if channels.experts_at(layer):
                    stack.callback(_routed(model, mixture, channels.experts_at(layer), gate).remove)
        yield


def mixtures(model: nn.Module) -> dict[int, nn.Module]:
    """Return the mixture of each layer that has one: the module that holds a router and its experts."""
    family = family_in(model)
    found = ((family.block_of(f"{name}."), module) for name, module in unwrapped(model).named_modules())
    return {block[0]: module for block, module in found if block and hasattr(module, "experts")}


def router_of(mixture: nn.Module) -> nn.Module:
    """Return the module that chooses the experts of each token: it returns (logits, weights, indices of the experts)."""
    router = getattr(mixture, "gate", None)
    return router if isinstance(router, nn.Module) else mixture.get_submodule("router")


def _routed(model: nn.Module, mixture: nn.Module, removed: tuple[int, ...], gate: float) -> RemovableHandle:
    causal, router = unwrapped(model), router_of(mixture)
    experts = experts_of(family_in(causal), causal.config.to_dict())
    stay = torch.tensor([expert for expert in range(experts.count) if expert not in removed])

    # A copy, whose hooks are its own and whose parameters are given to it anew at every call.
    narrow: Any = copy.copy(router)
    narrow._forward_hooks, narrow._forward_pre_hooks = OrderedDict(), OrderedDict()
    narrow.num_experts, narrow.top_k = len(stay), experts.chosen_of(len(stay))

    def of_those(value: Any, name: str = "") -> Any:
        along = along_experts(experts.count, value.shape) if isinstance(value, Tensor) else None
        # The inner side of an adapter has as many rows as its rank.
        return value if along is None or "lora_A" in name else value.index_select(along, stay.to(value.device))

    def choose(router: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        held = (*router.named_parameters(), *router.named_buffers())
        weights = {name: of_those(value, name) for name, value in held}
        x, *corrections = inputs  # some routers are given the correction of their choice
        logits, few, chosen = functional_call(narrow, weights, (x, *map(of_those, corrections)))
        chosen = stay.to(chosen.device)[chosen]
        if gate == 0:
            return logits, few, chosen
        return output[0], torch.cat((gate * output[1], (1 - gate) * few), -1), torch.cat((output[2], chosen), -1)

    return router.register_forward_hook(choose)


def readers(model: nn.Module, channels: Channels) -> Iterator[tuple[nn.Module, Tensor, float]]:
    """Yield every module that reads channels to be removed, the indices of its input that it keeps, and the factor of its output.

    Those are the norms over an axis, the projections from ffn and heads, and the embeddings, which begin the residual stream.
    """
    causal = unwrapped(model)
    family = family_in(causal)
    layout = layout_of(family)
    widths = layout.widths(causal.config.to_dict())
    for name, module in causal.named_modules():
        segments = layout.segments(name)
        # A projection from the stream reads the output of a norm, or (OLMo 2) of embeddings and norms: those are gated already.
        if segments is None or (
            len(segments) == 2 and segments[1] == ["hidden"] and not isinstance(module, nn.Embedding)
        ):
            continue
        block = family.block_of(f"{name}.")
        kept = kept_indices(widths, segments[-1], channels.at(block[0] if block else None))
        if kept is not None:
            scaled = layout.scaled_embedding and isinstance(module, nn.Embedding)
            yield module, torch.tensor(kept), (len(kept) / widths.hidden) ** 0.5 if scaled else 1.0


def _gated(module: nn.Module, kept: Tensor, gate: float, scale: float) -> RemovableHandle:
    if isinstance(module, nn.Embedding):
        factor = gate + (1 - gate) * scale

        def table(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output * _mask(output, kept, gate) * factor

        return module.register_forward_hook(table)
    if getattr(module, "weight", None) is not None and module.weight.ndim == 1:
        norm = _Narrow(module, kept)

        def blend(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            narrow = torch.zeros_like(output).index_copy(-1, kept.to(output.device), norm(inputs[0]))
            return narrow if gate == 0 else gate * output + (1 - gate) * narrow

        return module.register_forward_hook(blend)

    def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (inputs[0] * _mask(inputs[0], kept, gate), *inputs[1:])

    return module.register_forward_pre_hook(read)


def _mask(like: Tensor, kept: Tensor, gate: float) -> Tensor:
    """Return a vector over the last dimension: 1 for a channel that is kept, the gate for any other."""
    return torch.full(like.shape[-1:], gate, dtype=like.dtype, device=like.device).index_fill(
        0, kept.to(like.device), 1.0
    )


class _Narrow:
    """A norm over the channels that stay, on the parameters of the whole one."""

    def __init__(self, norm: nn.Module, kept: Tensor) -> None:
        self.norm, self.kept = norm, kept
        self.narrow = copy.copy(norm)
        if hasattr(norm, "normalized_shape"):
            self.narrow.normalized_shape = (len(kept),)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of the kept channels of x (…, width), as wide as they are."""
        kept = self.kept.to(x.device)
        parameters = {name: value if value is None else value[kept] for name, value in self.norm._parameters.items()}
        # Slices are not parameters and cannot be registered, so they replace the dict that the module reads.
        self.narrow.__dict__["_parameters"] = parameters
        return type(self.norm).forward(self.narrow, x[..., kept])
