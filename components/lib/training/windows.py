"""The windows that a training reads: in memory, or in files that are fetched one after the other.

The windows of a step are a function of the seed and the step's number, so that a resumed training, on however many processes, reads
what an uninterrupted one reads. Windows in files are shuffled file by file, and within each file: two files are in memory at once, none
stays on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Fetch = Callable[[str], AbstractContextManager[Path]]
"""Yields the path of one file of an artifact, by its name there."""

INDEX = "training.json"
"""The file that says how many windows there are for the trainings alone, and how many of them are in each file."""
FILES = "training-*.safetensors"
_AT_ONCE = 2
"""Files in memory: a batch may span two."""


def training_file(number: int) -> str:
    """Return the name of the file with this number, counted from 0."""
    return FILES.replace("*", f"{number:05d}")


class Windows:
    """Token windows (windows, length) in files, indexed as a tensor of all of them is."""

    def __init__(self, windows: int, per_file: int, fetch: Fetch) -> None:
        """Take the number of windows in all, the number in each file but the last, and the function that gives a file."""
        self.windows, self.per_file = windows, per_file

        @lru_cache(_AT_ONCE)
        def read(number: int) -> Tensor:
            with fetch(training_file(number)) as path:
                return load_file(path)["windows"]

        self._read = read

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the windows (n, length) of some indices (n,), int32."""
        return torch.stack([self._read(index // self.per_file)[index % self.per_file] for index in indices.tolist()])


def training_windows(folder: Path, drawn: Tensor, fetch: Fetch | None = None) -> Tensor | Windows:
    """Return the windows of calibrate that a training reads: those for the trainings alone, or those that were drawn for every stage.

    Args:
        folder: the folder of the calibration windows.
        drawn: those for every stage (windows, length).
        fetch: gives a file that is not in the folder; None if all are in it.
    """
    if not (folder / INDEX).exists():
        return drawn
    index = json.loads((folder / INDEX).read_text())
    return Windows(index["windows"], index["per_file"], fetch or _in(folder))


def _in(folder: Path) -> Fetch:
    @contextmanager
    def fetch(name: str) -> Iterator[Path]:
        """Yield the path of a file in the folder."""
        yield folder / name

    return fetch


class Order:
    """The windows of each step: shuffled again each epoch, and cut into batches that may span two epochs."""

    def __init__(self, windows: Tensor | Windows | int, batch_size: int, seed: int) -> None:
        """Take the windows, or their number if they are in one tensor."""
        self.windows = windows if isinstance(windows, int) else len(windows)
        self.per_file = windows.per_file if isinstance(windows, Windows) else self.windows
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int) -> Tensor:
        """Return the indices (batch_size,) of the windows of a step, counted from 0."""
        first = step * self.batch_size
        last = first + self.batch_size - 1
        epochs = range(first // self.windows, last // self.windows + 1)
        start = first - epochs[0] * self.windows
        return torch.cat([self._epoch(epoch) for epoch in epochs])[start : start + self.batch_size]

    def _epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        starts = range(0, self.windows, self.per_file)
        files = torch.randperm(len(starts), generator=generator).tolist() if len(starts) > 1 else [0]
        sizes = [min(self.per_file, self.windows - start) for start in starts]
        return torch.cat([starts[file] + torch.randperm(sizes[file], generator=generator) for file in files])
