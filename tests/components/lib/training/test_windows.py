"""The windows of a training: an order that the seed and the step decide, in memory or in files that are read one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.lib.training.windows import INDEX, Order, Windows, training_file, training_windows


class TestOrder:
    def test_an_epoch_sees_every_window_once_and_the_next_one_in_another_order(self) -> None:
        order = Order(windows=10, batch_size=4, seed=0)
        seen = torch.cat([order.batch(step) for step in range(5)]).tolist()
        assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
        assert seen[:10] != seen[10:]

    def test_a_batch_may_hold_several_epochs(self) -> None:
        batch = Order(windows=3, batch_size=8, seed=0).batch(1)
        assert len(batch) == 8
        assert set(batch.tolist()) == {0, 1, 2}

    def test_a_step_sees_the_same_whatever_was_asked_before(self) -> None:
        late = Order(windows=10, batch_size=4, seed=3).batch(7)
        order = Order(windows=10, batch_size=4, seed=3)
        assert [order.batch(step) for step in range(8)][-1].tolist() == late.tolist()

    def test_another_seed_gives_another_order(self) -> None:
        assert Order(50, 8, seed=0).batch(0).tolist() != Order(50, 8, seed=1).batch(0).tolist()


PER_FILE = 4
ALL = torch.arange(10, dtype=torch.int32)[:, None].expand(10, 3).contiguous()
"""Ten windows of three tokens; in files of four they are three files."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The windows in files, as calibrate leaves them."""
    for number, part in enumerate(ALL.split(PER_FILE)):
        save_file({"windows": part.contiguous()}, tmp_path / training_file(number))
    (tmp_path / INDEX).write_text(json.dumps({"windows": 10, "per_file": PER_FILE}))
    return tmp_path


class Fetched:
    """Gives files of a folder, and counts them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, list[str]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[Path]:
        self.names.append(name)
        yield self.folder / name


class TestInFiles:
    def test_they_are_read_as_one_tensor_would_be(self, folder: Path) -> None:
        windows = training_windows(folder, torch.zeros(2, 3))
        assert len(windows) == 10
        assert torch.equal(windows[torch.tensor([9, 0, 4, 4])], ALL[[9, 0, 4, 4]])

    def test_those_for_every_stage_are_read_if_there_are_no_others(self, tmp_path: Path) -> None:
        drawn = torch.zeros(2, 3)
        assert training_windows(tmp_path, drawn) is drawn

    def test_an_epoch_sees_every_window_once_and_fetches_every_file_once(self, folder: Path) -> None:
        fetched = Fetched(folder)
        windows = Windows(10, PER_FILE, fetched)
        order = Order(windows, batch_size=2, seed=1)
        seen = [int(window[0]) for step in range(5) for window in windows[order.batch(step)]]
        assert sorted(seen) == list(range(10))
        assert sorted(fetched.names) == [training_file(number) for number in range(3)]

    def test_the_files_come_in_another_order_each_epoch_and_are_shuffled_within(self, folder: Path) -> None:
        order = Order(Windows(10, PER_FILE, Fetched(folder)), batch_size=10, seed=0)
        epochs = [order.batch(step).tolist() for step in range(20)]
        files = [[index // PER_FILE for index in epoch] for epoch in epochs]
        firsts = {file[0] for file in files}
        assert firsts == {0, 1, 2}
        assert all(sum(one != other for one, other in pairwise(file)) == 2 for file in files)
        assert any(epoch != sorted(epoch) for epoch in epochs)

    def test_a_step_reads_the_same_whatever_was_read_before(self, folder: Path) -> None:
        windows = Windows(10, PER_FILE, Fetched(folder))
        order, resumed = Order(windows, 4, seed=3), Order(windows, 4, seed=3)
        assert [order.batch(step).tolist() for step in range(9)][-1] == resumed.batch(8).tolist()
