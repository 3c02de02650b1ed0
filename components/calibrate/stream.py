"""Draw windows from a text that is too large to hold: many places of it are read at once, and a window is taken from any of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from components.lib.transformer.text import consecutive_windows, token_stream, windows_possible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACES = 64
"""Row groups that are read at once: so many places of the text are in any part of the windows."""
_CHARACTERS = 8
"""More than a token has in almost every text."""
_PIECE = 1 << 18
"""Characters that are tokenised at once in one place, at most: bounds what all places hold."""


def stream_windows(
    groups: Iterator[Iterator[str]], tokenizer: PreTrainedTokenizerBase, length: int, wanted: int, seed: int
) -> Iterator[Tensor]:
    """Yield windows (length,) of the documents, in a random order that the seed decides, until there are no more.

    A window lies inside a piece of some documents, joined and tokenised as `token_stream` does; the tokens after the last whole window of
    a piece are left out. A piece is small if few windows are wanted, so that no more is read than they need.

    Args:
        groups: the documents of each place.
        tokenizer: the release's own.
        length: tokens of a window.
        wanted: how many windows the caller will take.
        seed: equal seeds draw equal windows.
    """
    generator = random.Random(seed)
    characters = max(_CHARACTERS * length * 8, min(_PIECE, _CHARACTERS * length * -(-wanted // PLACES)))
    places: list[Iterator[Tensor]] = []
    while True:
        while len(places) < PLACES and (documents := next(groups, None)) is not None:
            own = random.Random(generator.randrange(1 << 32))
            places.append(_windows_of(documents, tokenizer, length, characters, own))
        if not places:
            return
        place = generator.randrange(len(places))
        window = next(places[place], None)
        if window is None:
            del places[place]
        else:
            yield window


def _windows_of(
    documents: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    characters: int,
    generator: random.Random,
) -> Iterator[Tensor]:
    for piece in _pieces(documents, characters):
        stream = token_stream(piece, tokenizer).int()
        if windows_possible(stream, length):
            windows = consecutive_windows(stream, length)
            yield from (windows[index] for index in generator.sample(range(len(windows)), len(windows)))


def _pieces(documents: Iterator[str], characters: int) -> Iterator[list[str]]:
    """Yield the documents in lists of at least so many characters, but for the last."""
    piece: list[str] = []
    size = 0
    for document in documents:
        piece.append(document)
        size += len(document)
        if size >= characters:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
