"""The demonstration's texts: prose that every machine has, and none of it in two texts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.demo import text as demo_text

CHARACTERS = 400_000


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return demo_text.texts(CHARACTERS, seed=0)


def shingles(text: str) -> set[str]:
    """Twelve words in a row, inside one paragraph."""
    found = set()
    for line in text.splitlines():
        words = re.findall("[a-z]+", line.lower())
        found |= {" ".join(words[start : start + 12]) for start in range(len(words) - 11)}
    return found


def test_every_text_is_as_long_as_asked(texts: dict[str, str]) -> None:
    asked = {**demo_text.HELD_OUT, "train": CHARACTERS}
    assert set(texts) == set(asked) == set(demo_text.TEXTS)
    for name, text in texts.items():
        # The last document is taken whole; the longest, a chapter of the language reference, has 70,000 characters.
        assert asked[name] <= len(text) < asked[name] + 100_000


def test_no_twelve_words_in_a_row_stand_in_two_texts(texts: dict[str, str]) -> None:
    rows = {name: shingles(text) for name, text in texts.items()}
    assert all(len(found) > 5_000 for found in rows.values())
    assert [(a, b) for a in rows for b in rows if a < b and rows[a] & rows[b]] == []


def test_the_texts_are_prose(texts: dict[str, str]) -> None:
    for text in texts.values():
        assert ">>>" not in text
        words = text.split()
        assert sum(word.strip(".,;:?!()\"'`*").isalpha() for word in words) > 0.85 * len(words)


def test_the_seed_decides_which_documents_are_held_out(texts: dict[str, str]) -> None:
    assert demo_text.texts(CHARACTERS, seed=0) == texts
    assert demo_text.texts(CHARACTERS, seed=1)["test"] != texts["test"]


def test_docstrings_are_found_in_modules_classes_and_functions(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '#!/usr/bin/env python\n"""Module."""\nclass A(B):\n    r"""Class."""\n    def f(self) -> int:\n\n        """Function,\n        on two lines."""\n'
    )
    (tmp_path / "b.py").write_text('value = """no docstring"""\ndef broken(:\n    """Found all the same."""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_text('"""Left out."""\n')
    assert list(demo_text.docstrings(tmp_path)) == [
        "Module.",
        "Class.",
        "Function,\n        on two lines.",
        "Found all the same.",
    ]


@pytest.mark.parametrize(
    ("document", "kept"),
    [
        ("It goes over the line's end,\n    and is one paragraph all the same.", ["It goes over the line's end, and is one paragraph all the same."]),
        ("Notes\n-----\nWhat stands under a heading is kept, without the heading itself.", ["What stands under a heading is kept, without the heading itself."]),
        ("Too short to tell anything.", []),
        ("This one shows an example of how it is used:\n>>> f(1)\n1", []),
        ("x : int, optional\n    The number of things that are to be counted by it.", []),
        ("for i in range(10): if a[i] > b[i] and c[i] == d[i]: e += f(a[i], b[i]).", []),
    ],
    ids=["joined", "heading", "short", "example", "parameters", "code"],
)  # fmt: skip
def test_only_prose_is_kept_of_a_document(document: str, kept: list[str]) -> None:
    assert list(demo_text.paragraphs(document)) == kept
