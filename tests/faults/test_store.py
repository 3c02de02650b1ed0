"""A few rounds of the matrix's first row; `make faults` runs them all."""

from __future__ import annotations

import pytest

from tests.faults.store_round import store_round


@pytest.mark.parametrize("seed", [9, 13, 23])  # broken at first: a flipped upload, one that was not kept, and an orphan
def test_a_round_of_put_find_and_get_keeps_every_promise(seed: int, s3_server: dict[str, str]) -> None:
    ended = store_round(seed, s3_server)
    assert not ended.wrong
    assert ended.faults
