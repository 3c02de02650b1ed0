"""English text from the Python installation, for the release of the demonstration.

The texts for training, calibration and test are technical prose: the Python documentation's topics, the docstrings of the
standard library, and for training also those of a few packages. The text `other` is of another kind: the descriptions of
installed packages. Signatures, tables and examples are left out, and no two texts share twelve consecutive words.
"""

from __future__ import annotations

import inspect
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata, util
from pathlib import Path
from pydoc_data.topics import topics

PACKAGES = ("numpy", "scipy", "networkx", "pandas")
"""Packages whose docstrings are training text: they are long, in prose, and dependencies of this package."""

HELD_OUT = {"test": 80_000, "other": 80_000, "calibration": 300_000}
"""Characters of each held-out text."""

TEXTS = (*HELD_OUT, "train")
"""The texts' names, in the order in which they choose their documents."""

SHINGLE = 12
"""Consecutive words that two texts may not share: fewer are common phrases, more would miss a copied sentence."""

# A docstring's place is after the line that opens a block, or at the top of the file.
_DOCSTRING = re.compile(r'(?:\A(?:#[^\n]*\n|\s)*|:[ \t]*\n\s*)[rRuU]?"""(.+?)"""', re.DOTALL)
_HEADING = re.compile(r"^[^\n]+\n[-=*~^#]{3,}$\n?", re.MULTILINE)
_NO_PROSE = re.compile(r">>>|::=|^\s*[|$]|^\s*\S+ : ", re.MULTILINE)
_WORD = re.compile(r"[(\"'“‘]*[A-Za-z][a-z'’-]*[.,;:?!)\"'”’]*")
_NO_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}


def texts(characters: int, seed: int) -> dict[str, str]:
    """Return the four texts by name: `test`, `other`, `calibration`, and `train` of about so many characters.

    A blank line separates documents, and each paragraph is one line. The same packages and seed give the same
    texts.
    """
    shuffle = random.Random(seed)
    documentation = _shuffled([*topics.values(), *docstrings(Path(sysconfig.get_path("stdlib")))], shuffle)
    descriptions = _shuffled(_descriptions(), shuffle)
    packages = _shuffled((text for name in PACKAGES if characters for text in docstrings(_folder(name))), shuffle)
    seen: set[int] = set()
    held_out = {
        name: list(_take(descriptions if name == "other" else documentation, length, seen))
        for name, length in HELD_OUT.items()
    }
    # Fill up with the packages after the documentation, then shuffle.
    rest = _take(_chained(documentation, packages), characters, seen)
    return {
        name: "\n\n".join(documents) for name, documents in (*held_out.items(), ("train", _shuffled(rest, shuffle)))
    }


def docstrings(folder: Path) -> Iterator[str]:
    """Yield the docstrings of a folder's modules, tests and other packages' folders left out.

    They are found by their position, without parsing: a docstring elsewhere (after a comment, in single quotes) is missed.
    """
    for path in sorted(folder.rglob("*.py")):
        if not _NO_LIBRARY.intersection(path.relative_to(folder).parts):
            yield from _DOCSTRING.findall(path.read_text(encoding="utf-8", errors="replace"))


def paragraphs(document: str) -> Iterator[str]:
    """Yield a document's paragraphs of prose, each as one line."""
    for block in re.split(r"\n\s*\n", _HEADING.sub("", inspect.cleandoc(document))):
        words = block.split()
        if _is_prose(words) and not _NO_PROSE.search(block):
            yield " ".join(words)


def _is_prose(words: list[str]) -> bool:
    """Return True for at least eight words from a capital letter to a full stop, three quarters of them without symbols."""
    if len(words) < 8 or not words[0][0].isupper() or words[-1][-1] not in ".:!?)":
        return False
    return sum(bool(_WORD.fullmatch(word)) for word in words) >= 0.75 * len(words)


def _take(documents: Iterator[str], characters: int, seen: set[int]) -> Iterator[str]:
    """Yield cleaned documents until there are so many characters, without paragraphs that share a shingle with `seen`; add their shingles to it."""
    taken = 0
    while taken < characters and (document := next(documents, None)) is not None:
        new = [part for part in paragraphs(document) if not seen.intersection(_shingles(part))]
        seen.update(shingle for part in new for shingle in _shingles(part))
        text = "\n".join(dict.fromkeys(new))
        if len(text) >= 120:
            taken += len(text)
            yield text


def _shingles(paragraph: str) -> Iterator[int]:
    """Yield a hash for every twelve consecutive words, or one for all words if there are fewer."""
    words = re.findall("[a-z]+", paragraph.lower())
    for start in range(max(1, len(words) - SHINGLE + 1)):
        yield hash(tuple(words[start : start + SHINGLE]))


def _descriptions() -> Iterator[str]:
    """Yield the description of each installed package."""
    found = {each.name: each.metadata.json.get("description", "") for each in metadata.distributions()}
    for name in sorted(found):
        yield str(found[name])


def _folder(package: str) -> Path:
    """Return the folder of a package, found without importing it."""
    spec = util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed, which this package depends on: make setup")
    return Path(spec.origin).parent


def _shuffled(documents: Iterable[str], shuffle: random.Random) -> Iterator[str]:
    order = list(documents)
    shuffle.shuffle(order)
    return iter(order)


def _chained(*parts: Iterator[str]) -> Iterator[str]:
    for part in parts:
        yield from part
