"""AdamW in less memory: states of 8 bits, states in the machine's memory, and weights of bf16 that are rounded at random.

torch's AdamW takes each step, on a piece of a weight at a time: the piece, its gradient and its states are raised to fp32 on the weight's
device, and what comes out is stored again. The temporary memory is that of a piece, whatever the size of the model.

- *8 bits* (arXiv 2110.02861): 256 neighbouring numbers share a scale, the largest of them, and each is one of 256 values between −1 and 1, or
  0 and 1, which lie closer together near 0. Weights of fewer than 4096 numbers keep states of their own dtype.
- *Rounding at random*: a number between two of bf16 becomes one of them, the nearer one more often, so that on average nothing is lost.
  Rounding to the nearest loses every step smaller than half the distance, which is 1/512 of a weight.

torchao has the same parts, and is not used: it compiles a step for every shape of a weight, with a compiler that an image need not have, its
states are in no format that safetensors stores, and it cannot keep states elsewhere if gradients are clipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.optim.adamw import adamw

PIECE = 2**24
"""Numbers of a weight that are stepped at once: 64 MiB in fp32, of each of four tensors. A multiple of GROUP."""

GROUP = 256
"""Neighbouring numbers that share a scale."""

SMALL = 4096
"""Numbers of a weight from which on its states are kept in 8 bits."""

STATES = ("exp_avg", "exp_avg_sq")
"""The mean of the gradients, and that of their squares."""


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, β 0.9 and 0.999 and ε 1e-8, as torch.optim.AdamW.

    Args:
        weights: the parameters to train, each with its numbers in order in memory.
        lr: the learning rate.
        weight_decay: the part of a weight that is subtracted, times the learning rate.
        eight_bits: whether the states are kept in 8 bits.
        offload: whether the states are kept in the machine's memory.

    Raises:
        ValueError: processes divide the weights, and their states are to have 8 bits: 256 neighbours share a scale, and may be in two parts.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        *,
        eight_bits: bool = False,
        offload: bool = False,
    ) -> None:
        if eight_bits and any(isinstance(weight, DTensor) for weight in weights):
            raise ValueError(
                "weights that processes divide cannot have states of 8 bits: take others, or ESPALIER_PARALLEL=ddp"
            )
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})
        self.eight_bits, self.offload = eight_bits, offload

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step every weight that has a gradient. Random numbers are drawn for weights of bf16."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, group)

    def _step(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight] = self.state[weight] or self._made(weight)
        numbers, slopes = _local(weight).view(-1), _local(weight.grad).flatten()
        for piece in _pieces(len(numbers)):
            held = [_read(state, name, piece, numbers.device) for name in STATES]
            stepped = numbers[piece].float()
            adamw(
                [stepped],
                [slopes[piece].float()],
                *([one] for one in held),
                [],
                [state["step"].clone()],
                foreach=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            numbers[piece] = rounded(stepped, numbers.dtype)
            for name, value in zip(STATES, held, strict=True):
                _write(state, name, piece, value)
        state["step"] += 1

    def _made(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the states before the first step: 0."""
        device = "cpu" if self.offload else None
        state = {"step": torch.zeros(())}
        for name in STATES:
            if self.eight_bits and weight.numel() >= SMALL:
                state[name] = torch.full_like(weight, _values(name).index(0.0), dtype=torch.uint8, device=device)
                groups = -(-weight.numel() // GROUP)
                state[_scale(name)] = torch.zeros(groups, device=device or weight.device)
            else:
                state[name] = torch.zeros_like(weight, device=device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the groups' settings and the states; a weight that is given none has none afterwards.

        Each state keeps its dtype and its device, unlike torch's, which follow the weight.
        """
        made = dict(self.state)
        self.state.clear()
        for own, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({name: value for name, value in given.items() if name != "params"})
            for weight, name in zip(own["params"], given["params"], strict=True):
                if name in state_dict["state"]:
                    state = self.state[weight] = made.get(weight) or self._made(weight)
                    for key, value in state_dict["state"][name].items():
                        state[key].copy_(value)


def rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 numbers in a dtype: in bf16 rounded at random, up as often as they are near to it, so that the mean is kept."""
    if dtype != torch.bfloat16:
        return numbers.to(dtype)
    # bf16 is the upper half of fp32's bits. A random lower half is added, and carries into the upper one as often as it should.
    bits = numbers.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    return bits.add(noise).bitwise_and_(-(2**16)).view(torch.float32).to(dtype)


def _pieces(count: int) -> Iterator[slice]:
    return (slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE))


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that processes divide, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _read(state: dict[str, Tensor], name: str, piece: slice, device: torch.device) -> Tensor:
    """Return a piece of a state in fp32, a copy."""
    stored = _local(state[name]).view(-1)[piece].to(device)
    if _scale(name) not in state:
        return stored.to(torch.float32, copy=True)
    scales = state[_scale(name)][_groups(piece)].to(device)
    values = torch.tensor(_values(name), device=device)[stored.int()]
    return values * scales.repeat_interleave(GROUP)[: len(values)]


def _write(state: dict[str, Tensor], name: str, piece: slice, value: Tensor) -> None:
    """Store a piece of a state."""
    stored = _local(state[name]).view(-1)
    if _scale(name) not in state:
        stored[piece] = rounded(value, stored.dtype).to(stored.device)
        return
    groups = functional.pad(value, (0, -len(value) % GROUP)).view(-1, GROUP)
    scales = groups.abs().amax(1)
    values = torch.tensor(_values(name), device=value.device)
    between = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(groups / scales.clamp(min=1e-30)[:, None], between, out_int32=True)
    stored[piece] = codes.flatten()[: len(value)].to(stored.device, torch.uint8)
    state[_scale(name)][_groups(piece)] = scales.to(stored.device)


def _groups(piece: slice) -> slice:
    return slice(piece.start // GROUP, -(-piece.stop // GROUP))


def _scale(name: str) -> str:
    return f"{name}_scale"


@cache
def _values(name: str) -> list[float]:
    """Return the 256 values of a state in 8 bits, rising: seven decades of them, each with twice as many as the one below."""
    signed = name == "exp_avg"
    found = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade + (not signed))
        middles = [(0.1 + 0.9 * (number + 0.5) / count) * 10.0 ** (decade - 6) for number in range(count)]
        found += [*middles, *(-middle for middle in middles)] if signed else middles
    return sorted(found)
