"""The micro batch `auto`: the most windows of one forward and backward pass that the device has room for.

On an accelerator the whole batch is tried, then half of it, until nothing runs out of memory. A processor is not tried: its system ends
the process instead of raising an error. There the memory of passes of one and two windows is counted, tensor by tensor; the difference is
that of a window.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components.lib.errors import out_of_memory
from components.lib.machine import free_memory

SHARE = 0.8
"""The part of a processor's free memory that is filled: freed memory breaks into pieces, and other processes grow."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make within the block, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.most = 0
        """The largest value of `live`."""
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage until it is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = None
            self.grow(storage.nbytes(), tensor)
            self.most = max(self.most, self.live)

    def grow(self, size: int, tensor: Tensor) -> None:
        """Add the bytes of a tensor's storage, and subtract them when it is freed."""
        self.live += size
        weakref.finalize(tensor.untyped_storage(), self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def most_windows(work: Callable[[int], None], batch: int, device: torch.device, reserved: int) -> int:
    """Return how many windows fit into one pass: 1 at least, `batch` at most.

    Args:
        work: a forward and a backward pass of so many windows, which adds to the gradients.
        batch: the windows of an optimizer step.
        device: the device that the work runs on.
        reserved: bytes that the training takes later: those of the optimizer's states.

    Raises:
        RuntimeError: not even one window fits on the accelerator.
    """
    if batch == 1:
        return 1
    return _by_trial(work, batch, device, reserved) if device.type == "cuda" else _by_account(work, batch, reserved)


def _by_trial(work: Callable[[int], None], batch: int, device: torch.device, reserved: int) -> int:
    windows = batch
    while not _fits(work, windows, device, reserved):
        windows = -(-windows // 2)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return windows


def _fits(work: Callable[[int], None], windows: int, device: torch.device, reserved: int) -> bool:
    """Return whether the pass has room beside the reserved bytes. An error of one window is raised."""
    try:
        kept = torch.empty(reserved, dtype=torch.uint8, device=device)
        work(windows)
        del kept
    except (RuntimeError, MemoryError) as error:
        if windows == 1 or not out_of_memory(error):
            raise
        return False
    return True


def _by_account(work: Callable[[int], None], batch: int, reserved: int) -> int:
    work(1)  # makes the gradients, whatever the number of windows
    one, two = (_counted(work, windows) for windows in (1, 2))
    window = max(1, two - one)
    # The processes of this machine share its memory.
    free = free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = SHARE * free - reserved - (one - window)
    return max(1, min(batch, int(room // window)))


def _counted(work: Callable[[int], None], windows: int) -> int:
    with LiveBytes() as bytes_:
        work(windows)
    return bytes_.most
