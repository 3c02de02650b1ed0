"""Learn one gate a layer with the weights frozen: TRSP's first regularisation (arXiv 2505.18232).

    minimise over g:  L_LM(W, g, X) + λ1 · Σ|g_i|

A gate scales the branch of its layer, x + g·(f(x) − x). Placement `output` is the paper's, g·f(x), which in a pre-norm network
also rescales the outputs of all layers below. Two more things differ from the released code. Gates are fp32: near 1 a bf16 number
cannot change by less than 0.0078. And after each step they are rescaled to a mean of 1, because the norms cancel a common scale:
without it all gates shrink together and hardly show which layer is needed least.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.lib.errors import Refusal
from components.lib.training.objective import lm_loss
from components.lib.training.windows import Order
from components.lib.transformer.gates import blocks, gated, skipped

if TYPE_CHECKING:
    from components.lib.methods.trsp import Trsp


def learn_gates(
    model: PreTrainedModel,
    windows: Tensor,
    start: Tensor,
    removed: Collection[int],
    settings: Trsp,
    *,
    steps: int,
    first: int = 0,
) -> Iterator[tuple[float, Tensor]]:
    """Learn the gates of the remaining layers, and yield the LM loss and the gates (layers,) after every step.

    Args:
        model: its weights are frozen during the learning.
        windows: token ids (windows, length).
        start: the initial gates (layers,).
        removed: layers that are skipped; their gates stay at 0.
        settings: λ1, placement, batch and learning rate.
        steps: Adam steps to take.
        first: steps taken in earlier rounds, so that the order of the windows continues.

    Raises:
        Refusal: the loss is not finite.
    """
    left = torch.tensor([layer not in removed for layer in range(len(blocks(model)))])
    gates = torch.where(left, start, 0.0).float().requires_grad_()
    optimizer = torch.optim.Adam([gates], lr=settings.learning_rate)
    order = Order(windows, settings.batch_size, settings.seed)
    with _frozen(model):
        for step in range(first, first + steps):
            batch = windows[order.batch(step)].long().to(model.device)
            optimizer.zero_grad()
            loss = _backward(model, batch, gates, left, settings)
            _refuse_unless_finite(loss, step, settings)
            optimizer.step()
            with torch.no_grad():
                gates.copy_(torch.where(left, gates / gates[left].mean(), 0.0))
            yield loss, gates.detach().clone()


def _backward(model: PreTrainedModel, batch: Tensor, gates: Tensor, left: Tensor, settings: Trsp) -> float:
    """Add the loss's gradient to the gates', and return L_LM. The activations of the whole batch are held in memory."""
    removed = torch.nonzero(~left).flatten().tolist()
    # A skipped layer is the identity, so its gate is 1 in either placement; a gate of 0 on the output would stop the residual stream.
    applied = torch.where(left, gates, 1.0)
    lm = torch.zeros((), device=batch.device)
    with skipped(model, removed), gated(model, applied, settings.placement):
        logits = model(input_ids=batch, use_cache=False).logits
        lm = lm_loss(logits, batch)
        (lm + settings.strength * gates.abs().sum().to(lm.device)).backward()
    return lm.item()


def _refuse_unless_finite(loss: float, step: int, settings: Trsp) -> None:
    if not torch.isfinite(torch.tensor(loss)):
        raise Refusal(
            f"the gates' loss is {loss} at step {step + 1} with methods.trsp.learning_rate {settings.learning_rate:g}: lower it"
        )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disable the weights' gradients during the block, which saves a third of the work and their memory."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
