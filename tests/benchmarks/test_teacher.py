"""What is lost with a teacher's largest probabilities, on a model whose gradients can be written out."""

from __future__ import annotations

import pytest

from benchmarks.teacher import compare
from tests.components.lib.training.tiny import VOCABULARY, counting, llama


def test_more_probabilities_are_nearer_and_all_are_exact() -> None:
    found = compare(llama(), counting(windows=3), [1, 2], [1, 8, VOCABULARY])
    one, eight, everything = found.values()
    assert one[0] < eight[0] < 1
    assert one[1] > eight[1] > 0
    assert one[2] > eight[2] > 0
    assert everything == pytest.approx((1, 0, 0), abs=1e-4)
