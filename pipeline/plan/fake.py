"""Run real code on fake tensors, and count the bytes that it would hold.

    with counted("cuda") as memory:
        memory.model = from_config(config)
        train(memory.model, …)
    memory.peak.total

Fake tensors have shapes and types and no bytes, so that a model of any size trains in seconds on any machine, by the code that trains it
later. A value that the code reads from a tensor is made up: 1 for a number, True for a truth. The memory is that of the allocator: every
live storage, counted once. Not in it are a library's workspaces inside a kernel, the fragmentation of freed memory, and the process itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook

from components.lib.training import loop, objective, teacher
from components.lib.training.adamw import AdamW
from components.lib.training.micro import LiveBytes
from components.lib.transformer import device, perplexity

Kind = Literal["cpu", "cuda"]

ALIKE = 3
"""Turns of a loop whose turns take the same memory: one, one that frees it, and one more."""

SLACK = 0.002
"""The part by which a maximum must rise before it is split again; the total is exact, and the difference counts as activations."""


@dataclass(frozen=True)
class Peak:
    """The bytes held at the worst moment, by what they are."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher: int = 0
    logits: int = 0
    """Everything as wide as the vocabulary: both models' logits, and their gradient."""
    activations: int = 0
    """The rest: what the backward pass needs, casts of the weights, and temporary tensors."""

    @property
    def total(self) -> int:
        """Return the bytes of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the bytes by part."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass
class Memory:
    """The account of a block: set `model` and `teacher` as soon as they are there, so that their weights are told from the rest."""

    model: nn.Module | None = None
    teacher: nn.Module | None = None
    peak: Peak = field(default_factory=Peak)
    optimizer: torch.optim.Optimizer | None = None
    """The optimizer that stepped last."""

    def of_optimizer(self) -> int:
        """Return the bytes of the optimizer's state."""
        states = self.optimizer.state.values() if self.optimizer else ()
        return _bytes(_storages(tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)))


class _Counter(LiveBytes):
    """Adds up live storages, and splits the sum into parts at its maximum."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.live_logits = 0
        self.split_at = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            return _made_up(args[0].dtype)
        if operation is torch.ops.aten.equal.default:
            return args[0].shape == args[1].shape
        if operation is torch.ops.aten.nonzero.default:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        if operation is torch.ops.aten.index.Tensor and _is_mask(args[1][0]):
            result = args[0].flatten(0, args[1][0].dim() - 1).clone()
            self.add(result)
            return result
        return super().__torch_dispatch__(operation, types, args, kwargs)

    def grow(self, size: int, tensor: Tensor) -> None:
        wide = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary()
        self.live += size
        self.live_logits += size * wide
        weakref.finalize(tensor.untyped_storage(), self._freed, size, wide)

    def _freed(self, size: int, wide: bool) -> None:
        self.split()
        self.live -= size
        self.live_logits -= size * wide

    def _vocabulary(self) -> int:
        return self.memory.model.config.get_text_config().vocab_size if self.memory.model else 0

    def split(self) -> None:
        """Split the sum into parts if it is the maximum, by more than SLACK: it rises and falls with every operation."""
        if self.live < self.most or self.most <= (1 + SLACK) * self.split_at:
            return
        self.split_at = self.most
        memory = self.memory
        weights = _storages(_tensors(memory.model))
        teacher = _storages(_tensors(memory.teacher))
        gradients = (
            _storages(one.grad for one in memory.model.parameters() if one.grad is not None) if memory.model else {}
        )
        known = Peak(
            weights=_bytes(weights),
            teacher=_bytes({key: size for key, size in teacher.items() if key not in weights}),
            gradients=_bytes(gradients),
            optimizer=memory.of_optimizer(),
            logits=self.live_logits,
        )
        memory.peak = replace(known, activations=max(0, self.most - known.total))


@contextmanager
def counted(kind: Kind) -> Iterator[Memory]:
    """Run the block on fake tensors, and yield its account, whose `peak` is known at the end.

    Args:
        kind: the device that the code will run on: it decides the precision `auto`, and how many logits are raised at once.
    """
    memory = Memory()
    with ExitStack() as stack:
        for patch in _patches(kind):
            stack.enter_context(patch)
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: setattr(memory, "optimizer", optimizer))
        stack.callback(hook.remove)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        counter = stack.enter_context(_Counter(memory))
        yield memory
        counter.split()
        memory.peak = replace(memory.peak, activations=memory.peak.activations + counter.most - memory.peak.total)
        if kind == "cuda" and isinstance(memory.optimizer, AdamW) and memory.optimizer.offload:
            memory.peak = replace(memory.peak, optimizer=0)  # in the machine's memory


def _patches(kind: Kind) -> Iterator[Any]:
    # There is one device, and fake weights cannot be exchanged.
    yield mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
    # Without this, transformers takes fake tensors for a compilation, and makes masks that a real pass does without.
    yield mock.patch("transformers.masking_utils.is_tracing", return_value=False)
    yield mock.patch.dict(perplexity.RAISED, cpu=perplexity.RAISED[kind])
    # All rows of the vocabulary take the same memory, a few at a time: more of them would take time alone.
    few_rows = perplexity.few_rows
    for module in (perplexity, objective, teacher):
        yield mock.patch.object(module, "few_rows", lambda logits: islice(few_rows(logits), ALIKE))
    # A window of the kept outputs, as good as nothing beside the model; the files themselves are not in memory.
    yield mock.patch.object(teacher, "_mapped", lambda path, shape, dtype: torch.empty(shape, dtype=dtype))
    if kind == "cuda":
        yield mock.patch.object(loop, "computes_in_bf16", return_value=True)
        # Fake weights are on the processor.
        yield mock.patch.object(device, "emulated_types", return_value=set())
    # In inference mode operations arrive whole, so that what they are made of would not be counted.
    yield mock.patch.multiple(torch.inference_mode, __enter__=_without_gradients, __exit__=_with_gradients)


def _without_gradients(block: Any) -> None:
    block.instead = torch.no_grad()
    block.instead.__enter__()


def _with_gradients(block: Any, *error: Any) -> None:
    block.instead.__exit__(*error)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _made_up(dtype: torch.dtype) -> float | int | bool:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _tensors(model: nn.Module | None) -> Iterator[Tensor]:
    if model is not None:
        yield from model.parameters()
        yield from model.buffers()


def _storages(tensors: Any) -> dict[int, int]:
    """Return the bytes of each storage by its identity; tied weights share one."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _bytes(storages: Mapping[int, int]) -> int:
    return sum(storages.values())
