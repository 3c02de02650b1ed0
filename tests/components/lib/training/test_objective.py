"""The objective: each part against its formula, and the weighted sum."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from components.lib.recipe.training import Objective
from components.lib.training.objective import (
    Targets,
    kl_divergence,
    lm_loss,
    relative_distance,
    targets,
    uses_teacher,
    weighted,
)
from tests.components.lib.training.tiny import counting, llama


def log_probabilities(seed: int = 0) -> torch.Tensor:
    return torch.log_softmax(torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_lm_loss_is_the_one_transformers_computes_on_every_token() -> None:
    model, batch = llama(), counting()[:3]
    with torch.no_grad():
        output = model(input_ids=batch, labels=batch)
    assert lm_loss(torch.log_softmax(output.logits, -1), batch).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_kl_is_the_mean_over_tokens_of_the_divergence_from_the_teacher() -> None:
    student, teacher = log_probabilities(0), log_probabilities(1)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert kl_divergence(student, teacher * 1.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl_divergence(student, student).item() == pytest.approx(0, abs=1e-6)


def test_kl_reads_logits_whatever_their_offset() -> None:
    student, teacher = log_probabilities(0), log_probabilities(1)
    assert kl_divergence(student, teacher + 3).item() == pytest.approx(kl_divergence(student, teacher).item(), rel=1e-4)


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
