"""How a run ended, as a later process reads it."""

from __future__ import annotations

from components.lib.store.runs import Ending, ending, leave_end, leave_unregistered
from components.lib.store.store import Store


def test_a_run_is_not_over_before_its_end_is_recorded(store: Store) -> None:
    leave_unregistered("one", "the target does not hold", store)
    assert ending("one", store) is None


def test_a_run_that_worked_and_registered_nothing_failed_for_good(store: Store) -> None:
    leave_end("one", succeeded=True)
    assert ending("one", store) == Ending(succeeded=True)
    leave_unregistered("one", "the target does not hold", store)
    assert ending("one", store) == Ending(
        succeeded=False, stage="register", reason="the target does not hold", lasting=True
    )
