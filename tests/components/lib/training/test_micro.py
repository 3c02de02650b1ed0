"""How many windows fit: by trial on an accelerator, by an account of one and two windows on a processor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from components.lib.training import micro
from components.lib.training.micro import LiveBytes, most_windows

MB = 2**20
CPU = torch.device("cpu")


def test_live_bytes_are_those_of_storages_once_and_until_they_are_freed() -> None:
    with LiveBytes() as counted:
        kept = torch.empty(MB, dtype=torch.uint8)
        kept.view(2, -1)
        torch.empty(3 * MB, dtype=torch.uint8)
        last = torch.empty(2 * MB, dtype=torch.uint8)
        assert (counted.live, counted.most) == (3 * MB, 4 * MB)
        del last
    assert counted.live == MB


@pytest.mark.parametrize(("free", "windows"), [(0, 1), (100, 5), (1000, 8)])
def test_a_processor_is_filled_to_its_share(free: int, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[Tensor] = []

    def work(count: int) -> None:
        # The first pass makes the gradients; a window takes 10 MB, and 6 MB are taken whatever their number.
        gradients[:] = gradients or [torch.empty(40 * MB, dtype=torch.uint8)]
        passing = [torch.empty(size * MB, dtype=torch.uint8) for size in (6, 10 * count)]
        del passing

    monkeypatch.setattr(micro, "free_memory", lambda: free * MB)
    assert micro.SHARE == 0.8
    assert most_windows(work, 8, CPU, reserved=15 * MB) == windows


class TestAnAccelerator:
    def test_is_tried_with_half_as_many_windows_until_they_fit(self) -> None:
        tried: list[int] = []

        def work(count: int) -> None:
            tried.append(count)
            if count > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        assert micro._by_trial(work, 10, CPU, reserved=0) == 3
        assert tried == [10, 5, 3]

    def test_that_has_no_room_for_one_window_says_so(self) -> None:
        def work(count: int) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            micro._by_trial(work, 4, CPU, reserved=0)

    def test_does_not_hide_another_error(self) -> None:
        def work(count: int) -> None:
            raise RuntimeError("shapes do not match")

        with pytest.raises(RuntimeError, match="shapes"):
            micro._by_trial(work, 4, CPU, reserved=0)
