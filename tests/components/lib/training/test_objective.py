"""The objective: each part against its formula, and the weighted sum."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from components.lib.recipe.training import Objective
from components.lib.training.objective import (
    Targets,
    Top,
    lm_loss,
    next_token_losses,
    relative_distance,
    targets,
    uses_teacher,
    weighted,
)
from components.lib.transformer.perplexity import RAISED
from tests.components.lib.training.tiny import counting, llama


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed))


BATCH = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, 3, 0]])


def test_lm_loss_is_the_one_transformers_computes_on_every_token() -> None:
    model, batch = llama(), counting()[:3]
    with torch.no_grad():
        output = model(input_ids=batch, labels=batch)
    assert lm_loss(output.logits, batch).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_kl_is_the_mean_over_tokens_of_the_divergence_from_the_teacher() -> None:
    student, teacher = (torch.log_softmax(logits(seed), dim=-1) for seed in (0, 1))
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert next_token_losses(logits(0), BATCH, logits(1))[2].item() == pytest.approx(expected.item(), rel=1e-5)
    assert next_token_losses(logits(0), BATCH, logits(0))[2].item() == pytest.approx(0, abs=1e-6)


def test_kl_reads_logits_whatever_their_offset() -> None:
    assert next_token_losses(logits(0), BATCH, logits(1) + 3)[2].item() == pytest.approx(
        next_token_losses(logits(0), BATCH, logits(1))[2].item(), rel=1e-4
    )


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("teacher", [None, logits(1)], ids=["alone", "teacher"])
def test_gradient_is_that_of_the_losses_written_out(
    monkeypatch: pytest.MonkeyPatch, teacher: torch.Tensor | None, rows: int
) -> None:
    monkeypatch.setitem(RAISED, "cpu", rows * 7)
    fused, plain = logits().requires_grad_(), logits().requires_grad_()
    weighted_sum, lm, kl = next_token_losses(fused, BATCH, teacher, lm=0.5, kl=0.7)
    assert not lm.requires_grad
    assert not kl.requires_grad
    (2 * weighted_sum).backward()
    loss = 0.5 * functional.cross_entropy(plain[:, :-1].flatten(0, 1), BATCH[:, 1:].flatten())
    if teacher is not None:
        divergence = functional.kl_div(plain.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
        loss = loss + 0.7 * divergence / 10
    (2 * loss).backward()
    torch.testing.assert_close(fused.grad, plain.grad)


def test_gradient_of_bf16_logits_is_rounded_only_once() -> None:
    half = logits().bfloat16().requires_grad_()
    next_token_losses(half, BATCH)[0].backward()
    exact = half.detach().float().requires_grad_()
    next_token_losses(exact, BATCH)[0].backward()
    assert half.grad is not None
    assert exact.grad is not None
    assert torch.equal(half.grad, exact.grad.bfloat16())


class TestTop:
    """A teacher of which the largest probabilities and the mass of the rest are known."""

    @staticmethod
    def known(k: int, seed: int = 1) -> Top:
        top = Top.of(logits(seed).flatten(0, 1), k)
        return Top(*(part.view(2, 5, -1) for part in top))

    @staticmethod
    def losses(teacher: torch.Tensor | Top) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the divergence and its gradient."""
        student = logits(0).requires_grad_()
        loss, _, kl = next_token_losses(student, BATCH, teacher, lm=0.0, kl=1.0)
        loss.backward()
        assert student.grad is not None
        return kl, student.grad

    def test_is_the_divergence_of_k_events_and_one_more(self) -> None:
        student, teacher = (torch.softmax(logits(seed), dim=-1) for seed in (0, 1))
        largest, tokens = teacher.topk(3)
        p = torch.cat([largest, 1 - largest.sum(-1, keepdim=True)], dim=-1)
        q = student.gather(-1, tokens)
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], dim=-1)
        expected = (p * (p / q).log()).sum(-1).mean()
        assert self.losses(self.known(3))[0].item() == pytest.approx(expected.item(), rel=1e-5)

    def test_its_gradient_is_that_of_the_divergence_written_out(self) -> None:
        student = logits(0).requires_grad_()
        known = self.known(3)
        log = student.log_softmax(-1).gather(-1, known.tokens)
        rest = torch.log1p(-log.exp().sum(-1, keepdim=True))
        mine = torch.cat([log, rest], dim=-1)
        (known.logs.exp() * (known.logs - mine)).sum(-1).mean().backward()
        torch.testing.assert_close(self.losses(known)[1], student.grad)

    def test_grows_with_k_to_the_whole_divergence(self) -> None:
        found = [self.losses(self.known(k)) for k in range(1, 8)]
        kl, gradient = self.losses(logits(1))
        assert all(few[0] <= more[0] + 1e-6 for few, more in itertools.pairwise(found))
        assert found[0][0] < 0.9 * kl
        torch.testing.assert_close(found[-1], (kl, gradient))

    def test_is_0_for_the_teacher_itself_and_for_one_that_is_sure(self) -> None:
        assert self.losses(self.known(2, seed=0))[0].item() == pytest.approx(0, abs=1e-6)
        sure = logits(1)
        sure[..., 3] += 1e4
        kl, gradient = self.losses(Top(*(part.view(2, 5, -1) for part in Top.of(sure.flatten(0, 1), 2))))
        assert kl.isfinite()
        assert gradient.isfinite().all()


def test_distance_is_relative_to_each_token_s_target() -> None:
    target = torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])
    state = target + torch.tensor([[[5.0, 0.0], [0.0, 0.5]]])
    assert relative_distance(state, target).item() == pytest.approx(1.0)


def test_loss_is_the_weighted_sum_of_the_parts_and_their_names_are_kept() -> None:
    weights = Objective(lm=0.5, kl=2.0, state=3.0)
    batch = torch.randint(7, (2, 5))
    state, target = torch.randn(2, 5, 4), Targets(torch.randn(2, 5, 7), torch.randn(2, 5, 4))
    parts = weighted(weights, torch.randn(2, 5, 7), state, batch, target)
    assert set(parts) == {"loss", "lm", "kl", "state"}
    assert parts["loss"].item() == pytest.approx(
        (0.5 * parts["lm"] + 2 * parts["kl"] + 3 * parts["state"]).item(), rel=1e-5
    )


def test_gradient_reaches_the_student_only() -> None:
    student, teacher, batch = llama(seed=0), llama(seed=1), counting()[:2]
    weights = Objective(lm=0, kl=1, state=0)
    parts = weighted(weights, student(input_ids=batch).logits, None, batch, targets(teacher, batch, weights))
    parts["loss"].backward()
    assert student.model.norm.weight.grad.abs().sum() > 0
    assert teacher.model.norm.weight.grad is None


def test_teacher_s_state_is_what_its_head_reads() -> None:
    model, batch = llama(), counting()[:2]
    target = targets(model, batch, Objective(lm=0, kl=1, state=1))
    assert target.state is not None
    assert target.logits is not None
    torch.testing.assert_close(functional.linear(target.state, model.lm_head.weight), target.logits)


def test_teacher_is_not_asked_for_what_has_no_weight() -> None:
    batch = counting()[:2]
    assert targets(llama(), batch, Objective(lm=1, kl=0, state=0)) == (None, None)
    assert targets(llama(), batch, Objective(lm=1, kl=0, state=1)).logits is None
    assert not uses_teacher(Objective(lm=1, kl=0, state=0))
    assert uses_teacher(Objective(lm=1, kl=0, state=1))
