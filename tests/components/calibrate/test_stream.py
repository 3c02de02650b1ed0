"""Windows of a text that is too large to hold: drawn from many places of it at once, and no more read than is taken."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from components.calibrate.stream import PLACES, stream_windows
from tests.components.lib.transformer import zoo

LENGTH = 8


class Groups:
    """Row groups of some documents each; every token of a group is its number. Counts what is read."""

    def __init__(self, groups: int, documents: int = 3, words: int = 40) -> None:
        self.groups, self.documents, self.words = groups, documents, words
        self.opened, self.read = 0, 0

    def __iter__(self) -> Iterator[Iterator[str]]:
        for number in range(self.groups):
            self.opened += 1
            yield self._documents(number)

    def _documents(self, number: int) -> Iterator[str]:
        for _ in range(self.documents):
            self.read += 1
            yield " ".join([f"w{3 + number % 90}"] * self.words)


def drawn(groups: Groups, count: int, seed: int = 0) -> list[torch.Tensor]:
    return list(islice(stream_windows(iter(groups), zoo.tokenizer(), LENGTH, count, seed), count))


def test_every_window_of_the_text_is_drawn_once() -> None:
    windows = drawn(Groups(5), 1000)
    assert len(windows) == 5 * (3 * 40 // LENGTH)
    assert all(len(set(window.tolist())) == 1 for window in windows)


def test_the_first_windows_come_from_many_places() -> None:
    first = drawn(Groups(PLACES), PLACES)
    assert len({int(window[0]) for window in first}) > PLACES // 2


def test_no_more_places_are_opened_than_are_read_at_once() -> None:
    groups = Groups(10 * PLACES)
    drawn(groups, 20)
    assert groups.opened == PLACES


def test_a_long_place_is_read_in_pieces() -> None:
    groups = Groups(1, documents=1000)
    drawn(groups, 5)
    assert groups.read < 20


def test_the_seed_decides() -> None:
    one, again, other = (torch.stack(drawn(Groups(9), 50, seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
