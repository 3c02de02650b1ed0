"""The training objective without penalties: the language model's loss, and distances to the dense model as a teacher.

    L = lm · L_LM + kl · KL(teacher ‖ student) + state · ‖h − h_T‖² / ‖h_T‖²

TRSP minimises L_LM alone (arXiv 2505.18232). The two other terms compare the student with the dense model on the same windows:
its next-token distribution, and the hidden state h (after the final norm) from which the distribution is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.lib.recipe.training import Objective
from components.lib.transformer.gates import final_state


class Targets(NamedTuple):
    """The teacher's outputs to compare with; None if the objective gives them no weight."""

    logits: Tensor | None  # (batch, length, vocabulary)
    state: Tensor | None  # (batch, length, hidden)


def uses_teacher(objective: Objective) -> bool:
    """Return True if the objective needs the dense model at all."""
    return objective.kl > 0 or objective.state > 0


@torch.no_grad()
def targets(teacher: nn.Module | None, batch: Tensor, objective: Objective) -> Targets:
    """Return the teacher's outputs for a batch of token ids (batch, length), as far as the objective needs them."""
    if teacher is None or not uses_teacher(objective):
        return Targets(None, None)
    with final_state(teacher) as seen:
        logits = teacher(input_ids=batch, use_cache=False).logits
        return Targets(logits if objective.kl > 0 else None, seen.value if objective.state > 0 else None)


def weighted(
    objective: Objective, logits: Tensor, state: Tensor | None, batch: Tensor, target: Targets
) -> dict[str, Tensor]:
    """Return the weighted sum as `loss`, and its parts by name, without their weights.

    Args:
        objective: the weights.
        logits: the student's (batch, length, vocabulary).
        state: the student's final hidden state (batch, length, hidden); None if it is not compared.
        batch: token ids (batch, length).
        target: the teacher's outputs.
    """
    log_probabilities = functional.log_softmax(logits.float(), dim=-1)
    parts = {"lm": lm_loss(log_probabilities, batch)}
    if target.logits is not None:
        parts["kl"] = kl_divergence(log_probabilities, target.logits)
    if target.state is not None and state is not None:
        parts["state"] = relative_distance(state, target.state)
    loss = torch.stack([getattr(objective, name) * part for name, part in parts.items()]).sum()
    return {"loss": loss, **parts}


def lm_loss(log_probabilities: Tensor, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of every token of the windows except the first of each."""
    return functional.nll_loss(log_probabilities[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def kl_divergence(log_probabilities: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) in nats, the mean over every position of the windows."""
    teacher = functional.log_softmax(teacher_logits.float(), dim=-1)
    return functional.kl_div(log_probabilities, teacher, reduction="sum", log_target=True) / teacher[..., 0].numel()


def relative_distance(state: Tensor, target: Tensor) -> Tensor:
    """Return ‖h − h_T‖² / ‖h_T‖², the mean over the tokens."""
    state, target = state.float(), target.float()
    return ((state - target).square().sum(-1) / target.square().sum(-1)).mean()
