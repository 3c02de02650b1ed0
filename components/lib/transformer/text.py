"""Text to tokens to windows, the way the pruning literature measures perplexity.

The protocol is the one of GPTQ, SparseGPT, SliceGPT and TRSP: the documents are joined with a blank line, the whole is
tokenised as one stream, and the stream is cut into windows of L tokens. A `.txt` file is one document, taken verbatim;
a row of a `.jsonl` or `.parquet` file is one document, so that the WikiText-2 rows of the Hub give the published stream.

    stream = token_stream(read_documents(Path("test.parquet")), tokenizer)
    windows = consecutive_windows(stream, length=2048)
"""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from components.lib.errors import Refusal

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
SUFFIXES = (".txt", ".jsonl", ".parquet")

_UNPACKED = 200_000_000
"""Characters that a file may unpack to, however small it is."""
PIECE = 1_000_000
"""Characters tokenised at once: bounds the tokenizer's own bookkeeping, which takes some hundred bytes a token."""
OVERLAP = 4_096
"""Characters two neighbouring pieces share: far more than any tokenizer looks ahead or back."""


def text_file(folder: Path) -> Path:
    """Return the one file of a text artifact (a folder), or the file itself when a file is given.

    Raises:
        Refusal: the folder does not hold exactly one file.
    """
    if folder.is_file():
        return folder
    files = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise Refusal(
            f"the text {folder} must be a folder with one file and holds {len(files)} ({names}): name one file"
        )
    return files[0]


def read_documents(path: Path, field: str = "text") -> list[str]:
    """Read a text file's documents: a `.txt` whole, or one document a row of `.jsonl` and `.parquet`.

    Empty documents are kept, as the protocol joins them too.

    Args:
        path: the file, in UTF-8.
        field: the column that holds the text; of no meaning for `.txt`.

    Raises:
        Refusal: another suffix, an unreadable or empty file, bytes that are not UTF-8, or a row without text in `field`.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise Refusal(f"the text {path} ends in {path.suffix!r}: use one of {', '.join(SUFFIXES)}")
    try:
        documents = readers[path.suffix.lower()](path, field)
    except UnicodeDecodeError as error:
        raise Refusal(f"the text {path} is not UTF-8 at byte {error.start}: convert it to UTF-8") from None
    except OSError as error:
        raise Refusal(f"the text {path} cannot be read ({error.strerror or error}): name a readable file") from None
    if not any(document.strip() for document in documents):
        raise Refusal(f"the text {path} is empty: name a file with text in it")
    return documents


def _read_txt(path: Path, _field: str) -> list[str]:
    # Bytes, not text mode: line ends stay as they are. A byte order mark is no part of the text.
    return [path.read_bytes().decode("utf-8-sig")]


def _read_jsonl(path: Path, field: str) -> list[str]:
    lines = (
        path.read_bytes().decode("utf-8-sig").split("\n")
    )  # not splitlines: U+2028 may stand raw inside a JSON string
    return [_json_document(path, number, line, field) for number, line in enumerate(lines, 1) if line.strip()]


def _json_document(path: Path, number: int, line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise Refusal(f"the text {path} has no JSON on line {number} ({said}): put one object on each line") from None
    if not isinstance(row, dict):
        raise Refusal(f"the text {path} has a {type(row).__name__} on line {number}: put one object on each line")
    require_column(path, field, row)
    return require_text(path, number, field, row[field])


def _read_parquet(path: Path, field: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        require_column(path, field, file.schema_arrow.names)
        column = _unpacked(path, file, field)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise Refusal(f"the text {path} cannot be read as parquet ({reason}): write the file anew") from None
    return [require_text(path, number, field, value) for number, value in enumerate(column, 1)]


def _unpacked(path: Path, file: ParquetFile, field: str) -> list[Any]:
    """Read a column in parts. Raises Refusal before a small file that unpacks to gigabytes fills the memory."""
    column: list[Any] = []
    size, most = 0, max(_UNPACKED, 100 * path.stat().st_size)
    for batch in file.iter_batches(batch_size=64, columns=[field]):
        # Not the batch's own bytes: a dictionary holds a text once that many rows name.
        part = batch.column(0).to_pylist()
        size += sum(len(value) for value in part if isinstance(value, str))
        if size > most:
            raise Refusal(
                f"the text {path} unpacks to more than {most / 1e6:.0f} MB, a hundred times its size or more: check where it is from"
            )
        column += part
    return column


def require_column(path: Path | str, field: str, columns: Iterable[str]) -> None:
    """Raise Refusal if a text has no column of that name."""
    if field not in columns:
        names = list(columns)
        there = ", ".join(names[:10]) + (" …" if len(names) > 10 else "") or "none"
        raise Refusal(f"the text {path} has no column {field!r}: set 'field' to one of its columns ({there})")


def require_text(path: Path | str, number: int, field: str, value: Any) -> str:
    """Return the value of a row, counted from 1. Raises Refusal if it is no text that UTF-8 can encode."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise Refusal(f"the text {path} has {kind} in column {field!r} of row {number}: leave rows without text out")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Refusal(
                f"the text {path} has half a character (a surrogate) in row {number}: write the row anew"
            ) from None
    return value


def token_stream(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Join the documents with a blank line and tokenise the whole once.

    A beginning-of-text token stands once, at the very start, if the tokenizer puts one before a text (as GPTQ's
    reference code leaves it); nothing is put between documents or at the end. Special tokens spelt out in the text are
    read as the tokenizer reads them.

    Long texts are tokenised in overlapping pieces, to the same tokens.

    Returns:
        (tokens,), int64.
    """
    text = SEPARATOR.join(documents)
    ids = torch.cat([torch.tensor(part, dtype=torch.long) for part in _encode_in_pieces(text, tokenizer)])
    return torch.cat([torch.tensor(_opening(tokenizer), dtype=torch.long), ids])


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-text token if the tokenizer adds one before a text, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


class _Piece(NamedTuple):
    """A stretch of the text, tokenised: the tokens' ids, and for each the index of its first character in the whole text."""

    ids: list[int]
    starts: list[int]

    def between(self, low: int, high: int) -> _Piece:
        """Return the tokens that start at a character in [low, high)."""
        some = slice(bisect_left(self.starts, low), bisect_left(self.starts, high))
        return _Piece(self.ids[some], self.starts[some])


def _encode_in_pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the text's tokens, part by part.

    Near a piece's ends its tokens may differ from those of the whole text, as the tokenizer does not see the text beyond. In
    the middle of their overlap, two pieces both see thousands of characters to either side: they are joined there if they agree.
    If they do not (a text without any break), the whole text is tokenised at once.
    """
    if len(text) <= PIECE or not tokenizer.is_fast:
        yield _encode(text, tokenizer)
        return
    yield from _joined(text, tokenizer) or [_encode(text, tokenizer)]


def _joined(text: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]] | None:
    """Return the tokens of each piece up to its seam with the next, or None if two pieces differ at their seam."""
    parts, seam = [], 0
    current = _tokenise_piece(text, 0, tokenizer)
    for begin in range(PIECE - OVERLAP, len(text) - OVERLAP, PIECE - OVERLAP):
        following = _tokenise_piece(text, begin, tokenizer)
        middle = begin + OVERLAP // 4, begin + 3 * OVERLAP // 4
        if current.between(*middle) != following.between(*middle):
            return None
        parts.append(current.between(seam, middle[0]).ids)
        current, seam = following, middle[0]
    return [*parts, current.between(seam, len(text)).ids]


def _tokenise_piece(text: str, begin: int, tokenizer: PreTrainedTokenizerBase) -> _Piece:
    encoding = tokenizer(
        text[begin : begin + PIECE], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return _Piece(encoding["input_ids"], [begin + start for start, _ in encoding["offset_mapping"]])


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Not verbose: a stream is longer than any model's context, and that is no fault to warn of.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return a prompt's token ids (1, tokens), as a user's message if the tokenizer has a chat template.

    Raises:
        Refusal: the template does not render, or asks for what transformers' sandbox does not allow, such as a file.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        try:
            prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # the template is a program of its own, and may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise Refusal(
                f"the chat template of {tokenizer.name_or_path} does not render ({reason}): correct it in the release, or delete it there"
            ) from None
    # A chat template writes the special tokens itself.
    ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return torch.tensor([ids], dtype=torch.long)


def draw_windows(stream: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Draw windows at random places, none overlapping another, every such placement equally likely.

    The places are drawn by stars and bars: `samples` distinct numbers out of (tokens left over + samples), sorted, give
    the number of left-over tokens before each window. The windows are then shuffled, so that the first few of them are
    a fair sample of the text too.

    Args:
        stream: (tokens,).
        samples: how many windows, N.
        length: tokens of a window, L.
        seed: equal seeds draw equal windows.

    Returns:
        (N, L), of the stream's type.

    Raises:
        Refusal: the stream holds fewer than N windows of L tokens.
    """
    possible = windows_possible(stream, length)
    if possible < samples:
        raise Refusal(
            f"calibration asks for {samples} windows of {length} tokens and the text's {len(stream)} tokens give "
            f"{possible}: lower calibration.samples or calibration.length, or name a longer text"
        )
    generator = random.Random(seed)
    left_over = len(stream) - samples * length
    places = sorted(generator.sample(range(left_over + samples), samples))
    starts = [place + number * (length - 1) for number, place in enumerate(places)]
    generator.shuffle(starts)
    return torch.stack([stream[start : start + length] for start in starts])


def consecutive_windows(stream: Tensor, length: int) -> Tensor:
    """Cut the stream into windows one after the other; the tokens after the last whole one are left out.

    Args:
        stream: (tokens,).
        length: tokens of a window, L.

    Returns:
        (tokens // L, L), a view of the stream.

    Raises:
        Refusal: the stream is shorter than one window.
    """
    count = windows_possible(stream, length)
    if count == 0:
        raise Refusal(
            f"the text has {len(stream)} tokens, which gives no window of {length}: shorten the windows or name a longer text"
        )
    return stream[: count * length].view(count, length)


def windows_possible(stream: Tensor, length: int) -> int:
    """Return how many windows of `length` tokens the stream gives without overlap."""
    return len(stream) // length


def load_windows(folder: Path) -> Tensor:
    """Read the windows that calibrate left in `folder`: token ids (N, L), int64."""
    return load_file(folder / "windows.safetensors")["windows"].long()
