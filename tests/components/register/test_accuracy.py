"""The headline metric of a task, the mean over tasks, and their errors."""

from __future__ import annotations

import pytest

from components.register.accuracy import Accuracy, Scores, accuracy, difference, mean_accuracy


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ({"acc": 0.6}, Accuracy(0.6)),
        ({"acc": 0.6, "acc_stderr": 0.1, "acc_norm": 0.65, "acc_norm_stderr": 0.2}, Accuracy(0.65, 0.2)),
        ({"acc": 0.0}, Accuracy(0.0)),
        ({"acc_norm": None, "acc": 0.6}, Accuracy(0.6)),
        ({"exact_match": 0.5}, None),
        (None, None),
    ],
)
def test_normalised_accuracy_comes_first(scores: Scores | None, found: Accuracy | None) -> None:
    assert accuracy(scores) == found


def test_the_error_of_a_mean_is_that_of_independent_tasks() -> None:
    tasks = {"a": {"acc": 0.5, "acc_stderr": 0.03}, "b": {"acc": 0.7, "acc_stderr": 0.04}}
    mean = mean_accuracy(tasks, ["a", "b"])
    assert mean is not None
    assert (mean.value, mean.error) == pytest.approx((0.6, 0.025))


def test_a_mean_without_one_of_its_tasks_is_none() -> None:
    assert mean_accuracy({"a": {"acc": 0.5}}, ["a", "b"]) is None
    assert mean_accuracy({}, []) is None


def test_the_error_of_a_difference_is_known_if_both_are() -> None:
    apart = difference(Accuracy(0.5, 0.03), Accuracy(0.4, 0.04))
    assert (apart.value, apart.error) == pytest.approx((0.1, 0.05))
    assert difference(Accuracy(0.5), Accuracy(0.4, 0.04)).error is None
