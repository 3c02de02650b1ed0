"""AdamW in less memory takes the steps of torch's, as exactly as its states and weights are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.lib.training import adamw
from components.lib.training.adamw import AdamW, rounded

SHAPE = (90, 50)  # more than SMALL, and no multiple of GROUP


def stepped(optimizer: type[torch.optim.Optimizer], dtype: torch.dtype = torch.float32, **fields: Any) -> Tensor:
    """Return a weight after some steps on noisy gradients, of which every other one is larger."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE).to(dtype))
    made = optimizer([weight], lr=0.01, weight_decay=0.1, **fields)
    for step in range(12):
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
        weight.grad = ((0.5 + noise) * (1 + step % 2)).to(dtype)
        made.step()
    return weight.detach()


@pytest.mark.parametrize("piece", [2**24, 1024])
def test_in_fp32_the_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(adamw, "PIECE", piece)
    torch.testing.assert_close(stepped(AdamW), stepped(torch.optim.AdamW), rtol=1e-6, atol=1e-7)


def test_a_weight_without_a_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(3))
    AdamW([weight], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(3))


class TestEightBits:
    @pytest.mark.parametrize("piece", [2**24, 1024])
    def test_the_steps_are_nearly_those_of_torch(self, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
        monkeypatch.setattr(adamw, "PIECE", piece)
        torch.manual_seed(0)
        start = torch.randn(SHAPE)
        exact, found = stepped(torch.optim.AdamW), stepped(AdamW, eight_bits=True)
        assert (found - exact).norm() < 0.05 * (exact - start).norm()

    def test_a_number_and_its_scale_are_stored(self) -> None:
        weight = nn.Parameter(torch.zeros(SHAPE))
        weight.grad = torch.randn(SHAPE)
        optimizer = AdamW([weight], lr=0.01, eight_bits=True)
        optimizer.step()
        state = optimizer.state[weight]
        assert {name: (tuple(one.shape), one.dtype) for name, one in state.items()} == {
            "step": ((), torch.float32),
            "exp_avg": (SHAPE, torch.uint8),
            "exp_avg_scale": ((18,), torch.float32),
            "exp_avg_sq": (SHAPE, torch.uint8),
            "exp_avg_sq_scale": ((18,), torch.float32),
        }

    def test_a_state_is_off_by_a_hundredth_of_the_largest_of_its_group_at_most(self) -> None:
        for name, values in (("exp_avg", torch.randn(1000)), ("exp_avg_sq", torch.randn(1000).square())):
            state = {name: torch.zeros(1000, dtype=torch.uint8), f"{name}_scale": torch.zeros(4)}
            adamw._write(state, name, slice(0, 1000), values)
            back = adamw._read(state, name, slice(0, 1000), values.device)
            for one, other in zip(values.split(256), back.split(256), strict=True):
                assert (one - other).abs().max() < 0.01 * one.abs().max()
            assert ((back - values).abs() < 0.2 * values.abs() + 1e-5 * values.abs().max()).all()

    def test_a_small_weight_keeps_states_of_its_own_dtype(self) -> None:
        weight = nn.Parameter(torch.zeros(8))
        weight.grad = torch.ones(8)
        optimizer = AdamW([weight], lr=0.01, eight_bits=True)
        optimizer.step()
        assert optimizer.state[weight]["exp_avg"].dtype == torch.float32


class TestBf16:
    def test_a_number_is_rounded_to_a_neighbour_and_keeps_its_mean(self) -> None:
        torch.manual_seed(0)
        for number in (1.0 + 0.25 * 2**-7, -3.0 - 0.75 * 2**-6, 0.1):
            found = rounded(torch.full((20_000,), number), torch.bfloat16).float()
            assert len(found.unique()) == 2
            assert found.mean().item() == pytest.approx(number, rel=2e-4)

    def test_a_number_of_bf16_stays(self) -> None:
        numbers = torch.randn(1000).bfloat16()
        assert torch.equal(rounded(numbers.float(), torch.bfloat16), numbers)

    def test_steps_that_rounding_to_the_nearest_would_lose_add_up(self) -> None:
        moved = {}
        for optimizer in (AdamW, torch.optim.AdamW):
            weight = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
            made = optimizer([weight], lr=1e-4, weight_decay=0.0)
            torch.manual_seed(0)
            for _ in range(50):
                weight.grad = torch.ones_like(weight)
                made.step()
            moved[optimizer] = 1 - weight.float().mean().item()
        assert moved[torch.optim.AdamW] == 0
        assert moved[AdamW] == pytest.approx(50e-4, rel=0.1)


def test_states_elsewhere_are_on_the_processor() -> None:
    """Whatever device the weight is on: here one that holds no numbers."""
    weight = nn.Parameter(torch.zeros(SHAPE, device="meta"))
    for eight_bits in (False, True):
        state = AdamW([weight], lr=0.01, eight_bits=eight_bits, offload=True)._made(weight)
        assert {one.device.type for one in state.values()} == {"cpu"}


@pytest.mark.parametrize("fields", [{}, {"eight_bits": True}, {"offload": True}])
def test_states_that_are_loaded_keep_their_dtype(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE).bfloat16())
    weight.grad = torch.randn(SHAPE).bfloat16()
    one, other = AdamW([weight], lr=0.01, **fields), AdamW([weight], lr=0.5, **fields)
    one.step()
    other.load_state_dict(one.state_dict())
    assert other.param_groups[0]["lr"] == 0.01
    for name, value in one.state[weight].items():
        assert torch.equal(other.state[weight][name], value)
        assert other.state[weight][name].dtype == value.dtype
        assert other.state[weight][name] is not value


def test_a_weight_that_is_given_no_states_has_none_afterwards() -> None:
    first, second = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    one, other = AdamW([first, second], lr=0.01), AdamW([first, second], lr=0.01)
    first.grad = torch.ones(3)
    one.step()
    second.grad = torch.ones(3)
    other.step()
    other.load_state_dict(one.state_dict())
    assert set(other.state) == {first}
