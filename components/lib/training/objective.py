"""The training objective without penalties: the language model's loss, and distances to the dense model as a teacher.

    L = lm · L_LM + kl · KL(teacher ‖ student) + state · ‖h − h_T‖² / ‖h_T‖²

TRSP minimises L_LM alone (arXiv 2505.18232). The two other terms compare the student with the dense model on the same windows:
its next-token distribution, and the hidden state h (after the final norm) from which the distribution is computed.

Of the teacher's distribution its k largest probabilities and the mass of the rest may be known alone (`Top`). KL is then that of k + 1
events: it is 0 where the student gives each the same mass, never more than the full KL, and its gradient is the full one of a
teacher that divides the rest as the student does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from components.lib.recipe.training import Objective
from components.lib.transformer.gates import final_state
from components.lib.transformer.perplexity import IGNORED, few_rows

FAINT = -80.0
"""The smallest log of the mass of the rest: below it, exp is no normal number of fp32."""


class Top(NamedTuple):
    """The largest probabilities of next-token distributions, and the mass of the rest."""

    tokens: Tensor  # (…, k), whole numbers
    logs: Tensor  # (…, k + 1): their log probabilities, then the log of the rest's mass; fp32

    @classmethod
    def of(cls, logits: Tensor, k: int) -> Top:
        """Return those of logits (rows, vocabulary), with k at most the vocabulary."""
        log = functional.log_softmax(logits.float(), dim=-1)
        largest, tokens = log.topk(k, dim=-1)
        rest = log.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True).clamp(min=FAINT)
        return cls(tokens, torch.cat([largest, rest], dim=-1))

    def filled(self, student: Tensor) -> Tensor:
        """Return log probabilities (rows, vocabulary) with these values, and the rest divided as the student divides it.

        Args:
            student: the student's log probabilities (rows, vocabulary).
        """
        tokens = self.tokens.long()
        rest = student.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
        return (student + (self.logs[..., -1:] - rest)).scatter(-1, tokens, self.logs[..., :-1])


class Targets(NamedTuple):
    """The teacher's outputs to compare with; None if the objective gives them no weight."""

    logits: Tensor | Top | None  # (batch, length, vocabulary), or what is known of it
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
    """Return the weighted sum as `loss`, and its parts by name, without their weights and without gradients.

    Args:
        objective: the weights.
        logits: the student's (batch, length, vocabulary).
        state: the student's final hidden state (batch, length, hidden); None if it is not compared.
        batch: token ids (batch, length).
        target: the teacher's outputs.
    """
    loss, lm, kl = next_token_losses(logits, batch, target.logits, objective.lm, objective.kl)
    parts = {"lm": lm} if target.logits is None else {"lm": lm, "kl": kl}
    if target.state is not None and state is not None:
        distance = relative_distance(state, target.state)
        loss, parts["state"] = loss + objective.state * distance, distance.detach()
    return {"loss": loss, **parts}


def lm_loss(logits: Tensor, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of every token of the windows (batch, length) except the first of each."""
    return next_token_losses(logits, batch)[0]


def next_token_losses(
    logits: Tensor, batch: Tensor, teacher_logits: Tensor | Top | None = None, lm: float = 1.0, kl: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return lm · L_LM + kl · KL(teacher ‖ student), and both losses without a gradient, in nats.

    L_LM is the mean over every token but the first of each window, KL the mean over every position. Both losses and the gradient

        lm · (p − 1[next token]) / n_LM + kl · (p − p_T) / n_KL,    p = softmax(logits)

    are computed a few rows of the vocabulary at a time, so that beside the logits only their gradient is held, in their type: the
    probabilities of a batch in fp32 are several times as large, and moving them takes more than half of a step on a CPU.

    Args:
        logits: the student's (batch, length, vocabulary).
        batch: token ids (batch, length).
        teacher_logits: as `logits`, or what is known of them; None if there is no teacher, and KL is then 0.
        lm: weight of the LM loss.
        kl: weight of the divergence.
    """
    following = functional.pad(batch[:, 1:], (0, 1), value=IGNORED).flatten()
    if isinstance(teacher_logits, Top):
        teacher: Tensor | Top | None = Top(*(part.flatten(0, 1) for part in teacher_logits))
    else:
        teacher = None if teacher_logits is None else teacher_logits.flatten(0, 1)
    loss, lm_part, kl_part = _NextToken.apply(logits.flatten(0, 1), following, teacher, lm, kl)
    return loss, lm_part, kl_part


class _NextToken(torch.autograd.Function):
    """`next_token_losses` on rows: logits (tokens, vocabulary), next tokens (tokens,)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, following: Tensor, teacher: Tensor | Top | None, lm: float, kl: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted sum and both losses, and keep the gradient of the sum for `backward`."""
        known = following != IGNORED
        lm_weights = known.float() / known.sum()  # of each row's cross-entropy in the mean
        kl_weight = 1 / len(logits)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums = logits.new_zeros(2, dtype=torch.float64)
        for rows in few_rows(logits):
            student = functional.log_softmax(logits[rows].float(), dim=-1)
            correct = following[rows, None].clamp(min=0)
            sums[0] -= (student.gather(1, correct)[:, 0] * lm_weights[rows]).sum()
            wanted = None
            if teacher is not None:
                log_wanted = _wanted(teacher, rows, student)
                wanted = log_wanted.exp()
                sums[1] += kl_weight * log_wanted.sub_(student).mul_(wanted).sum()
            if gradient is not None:
                weights = lm * lm_weights[rows] + (0.0 if wanted is None else kl * kl_weight)
                slope = student.exp_().mul_(weights[:, None])
                if wanted is not None:
                    slope.add_(wanted, alpha=-kl * kl_weight)
                slope.scatter_add_(1, correct, -lm * lm_weights[rows, None])
                gradient[rows] = slope
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        lm_part, kl_part = sums.float().unbind()
        loss = lm * lm_part + kl * kl_part
        lm_part, kl_part = lm_part.clone(), kl_part.clone()  # a view would count as differentiable
        ctx.mark_non_differentiable(lm_part, kl_part)
        return loss, lm_part, kl_part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the kept gradient times that of the sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def _wanted(teacher: Tensor | Top, rows: slice, student: Tensor) -> Tensor:
    """Return the teacher's log probabilities of some rows, a new tensor; `student` has the student's."""
    if isinstance(teacher, Top):
        return Top(teacher.tokens[rows], teacher.logs[rows]).filled(student)
    return functional.log_softmax(teacher[rows].float(), dim=-1)


def relative_distance(state: Tensor, target: Tensor) -> Tensor:
    """Return ‖h − h_T‖² / ‖h_T‖², the mean over the tokens."""
    state, target = state.float(), target.float()
    return ((state - target).square().sum(-1) / target.square().sum(-1)).mean()
