"""Gates, skips and views of a model's blocks, by forward hooks: no copied `forward`, any family.

A block is a map x → f(x) on the residual stream, (batch, length, hidden), whatever it does inside. All context managers
here leave the model as they found it, nest, and may be opened on a model that has peft adapters. A hook runs outside gradient
checkpointing, so it sees each block once a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from components.lib.transformer.families import row_of
from components.lib.transformer.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Placement = Literal["branch", "output"]
Output: TypeAlias = Tensor | tuple[Any, ...]


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model under the wrappers of peft and of several processes, or the model itself."""
    wrapped: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return cast("PreTrainedModel", wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped)


def text_config(model: nn.Module) -> PreTrainedConfig:
    """Return the config of the model, of a wrapper that of its text model."""
    config: Any = unwrapped(model).config
    return config.get_text_config()


def family_in(model: nn.Module) -> Family:
    """Return the row of the model's type. Raises Refusal for an unknown one."""
    return row_of(unwrapped(model).config.model_type, text_config(model).model_type)


def blocks(model: nn.Module) -> nn.ModuleList:
    """Return the model's blocks, first to last; of a wrapper those of its text model. Raises Refusal for an unknown model type."""
    return cast(nn.ModuleList, unwrapped(model).get_submodule(family_in(model).blocks))


def thawed(model: PreTrainedModel) -> PreTrainedModel:
    """Let every parameter require a gradient, of a wrapper those of its text model and head alone; return the model."""
    path = family_in(model).tower
    if not path:
        return model.requires_grad_(True)
    model.requires_grad_(False)
    for part in (model.get_submodule(path), model.get_output_embeddings()):
        part.requires_grad_(True)
    return model


def removable(model: nn.Module) -> list[int]:
    """Return the indices of the layers that can be removed, ascending."""
    return family_in(model).removable(unwrapped(model).config.to_dict())


@contextmanager
def gated(model: nn.Module, gates: Tensor, placement: Placement = "branch") -> Iterator[None]:
    """Gate every block: `x + g·(f(x) − x)` for placement branch, `g·f(x)` for output (TRSP, arXiv 2505.18232, as released).

    The gates are read at each forward pass, used in fp32 whatever the activations' dtype, and differentiable. A gate of
    exactly 1 leaves f(x) bit for bit, a branch gate of exactly 0 leaves x.

    Args:
        model: a causal language model.
        gates: (layers,), fp32.
        placement: whether the branch or the whole output is gated.
    """
    layers = blocks(model)
    if gates.shape != (len(layers),):
        raise ValueError(f"gates have the shape {tuple(gates.shape)}, but the model has {len(layers)} layers")

    def gate(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        def apply(x: Tensor, f: Tensor) -> Tensor:
            g = gates[layer].to(f.device)
            return _blend(x, f, g) if placement == "branch" else (g * f).to(f.dtype)

        return apply

    with _hooked((block, gate(layer)) for layer, block in enumerate(layers)):
        yield


@contextmanager
def skipped(model: nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """Let the named blocks return their input, exactly as if they were removed.

    The blocks are still computed, so that they fill their part of the key-value cache: cached generation works, and nothing is faster.
    """
    found = blocks(model)
    with _hooked((found[layer], lambda x, f: x) for layer in layers):
        yield


@contextmanager
def bypassed(model: nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """Skip the named blocks without computing them, faster than `skipped`.

    They leave their part of the key-value cache empty: for training and perplexity, not for generation.
    """
    tuples = family_in(model).tuples
    found = [blocks(model)[layer] for layer in set(layers)]
    # An attribute of the instance takes precedence over its class's method; one that is there already comes back.
    before = [vars(block).get("forward") for block in found]
    for block in found:
        block.forward = _identity_of_tuples if tuples else _identity
    try:
        yield
    finally:
        for block, forward in zip(found, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _identity_of_tuples(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return hidden_states, None


@contextmanager
def resumed(model: nn.Module, layer: int, windows: Tensor, stream: Tensor) -> Iterator[None]:
    """Let every forward pass begin behind block `layer`, from a known stream: the blocks through it are not computed.

    Like `bypassed` it is for training and perplexity, not for generation. A pass may read any rows of `windows`, in any batches.

    Args:
        model: a causal language model.
        layer: the last block that is not computed.
        windows: token ids (windows, length).
        stream: the residual stream behind the block for each of the windows (windows, length, hidden), on any device.
    """
    rows: list[Tensor | slice] = []

    def read(embedding: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[:] = [rows_of(windows, inputs[0])]

    handle = unwrapped(model).get_input_embeddings().register_forward_pre_hook(read)
    try:
        with (
            bypassed(model, range(layer + 1)),
            _hooked([(blocks(model)[layer], lambda x, f: stream[rows[0]].to(f.device))]),
        ):
            yield
    finally:
        handle.remove()


def rows_of(windows: Tensor, ids: Tensor) -> Tensor | slice:
    """Return where the rows of `ids` (batch, length) are in the windows.

    Raises:
        ValueError: one of them is not among the windows.
    """
    known = windows.to(ids.device)
    if torch.equal(known.to(ids.dtype), ids):
        return slice(None)
    same = (known[None] == ids[:, None]).all(-1)  # (batch, windows)
    if not same.any(-1).all():
        raise ValueError("a forward pass reads a window for which no stream is known")
    return same.int().argmax(-1).cpu()


@contextmanager
def watched(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Yield a dict that holds, after each forward pass, layer → (x, f(x)), both (batch, length, hidden) and in the graph.

    Opened inside `gated` or `skipped`, f(x) is the output after gating or skipping.
    """
    found = blocks(model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def see(layer: int) -> Callable[[Tensor, Tensor], None]:
        def keep(x: Tensor, f: Tensor) -> None:
            seen[layer] = (x, f)

        return keep

    try:
        with _hooked((found[layer], see(layer)) for layer in layers):
            yield seen
    finally:
        seen.clear()


@dataclass
class FinalState:
    """The head's input in the last forward pass."""

    value: Tensor | None = None
    """(batch, length, hidden), in the graph; None before the first forward pass."""


@contextmanager
def final_state(model: nn.Module) -> Iterator[FinalState]:
    """Yield an object whose `value` is, after each forward pass, the head's input: the last block's output after the final norm."""
    state = FinalState()

    def keep(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        state.value = inputs[0]

    handle = unwrapped(model).get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield state
    finally:
        handle.remove()
        state.value = None


class _Blend(torch.autograd.Function):
    """x + g·(f − x) in fp32, returned in f's dtype, for a scalar g.

    torch.lerp takes its end points exactly, which the formula does not. Saving x and f as they are (they live on in the
    graph anyway) and not their fp32 copies keeps a gate free of memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, f, g)
        return torch.lerp(x.float(), f.float(), g.float()).to(f.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, f, g = ctx.saved_tensors
        wants_x, wants_f, wants_g = ctx.needs_input_grad
        grad = gradients[0].float()
        return (
            (grad * (1 - g)).to(x.dtype) if wants_x else None,
            (grad * g).to(f.dtype) if wants_f else None,
            torch.sum(grad * (f.float() - x.float())).to(g.dtype) if wants_g else None,
        )


def _blend(x: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return _Blend.apply(x, f, g)


@contextmanager
def _hooked(hooks: Iterator[tuple[nn.Module, Callable[[Tensor, Tensor], Tensor | None]]] | Any) -> Iterator[None]:
    """Hook each block with a function of (x, f(x)) that returns the new output, or None to keep f(x)."""
    with ExitStack() as stack:
        for block, function in hooks:
            handle = block.register_forward_hook(_hook(function), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(function: Callable[[Tensor, Tensor], Tensor | None]) -> Callable[..., Output | None]:
    """Give `function` the hidden states alone: blocks take them by position or by name, and return them alone or first of a tuple."""

    def hook(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Output) -> Output | None:
        x = inputs[0] if inputs else named["hidden_states"]
        f = output if isinstance(output, Tensor) else output[0]
        changed = function(x, f)
        if changed is None or isinstance(output, Tensor):
            return changed
        return (changed, *output[1:])

    return hook
