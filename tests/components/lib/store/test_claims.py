"""Who works on an item: one watcher, for a limited time, whatever became of the one before."""

import multiprocessing
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest

from components.lib.errors import Refusal, Unavailable
from components.lib.store import claims as claims_module
from components.lib.store import store as store_module
from components.lib.store.claims import ATTEMPTS, Claim, Claims
from components.lib.store.runs import Ending, item_of, leave_end, leave_failure
from components.lib.store.store import Store

HOUR = timedelta(hours=1)
LASTING = Ending(succeeded=False, stage="pin", reason="the family is not known", lasting=True)
PASSING = Ending(succeeded=False, stage="evaluate", reason="OutOfMemoryError: no memory")


@pytest.fixture
def claims(store: Store) -> Claims:
    return Claims(store, HOUR, settle=0.0)


def test_an_item_is_free_until_it_is_taken(claims: Claims, store: Store) -> None:
    assert claims.standing("small", "k").state == "free"
    run = claims.take("small", "k")
    assert run is not None
    assert run.startswith("small-")
    assert item_of(run, store) == "k"
    found = claims.standing("small", "k")
    assert found.state == "claimed"
    assert run in found.detail
    assert claims.take("small", "k") is None


def test_another_name_or_another_key_is_another_item(claims: Claims) -> None:
    claims.take("small", "k")
    assert claims.standing("tiny", "k").state == "free"
    assert claims.standing("small", "k2").state == "free"


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what is bound to come, however slow the machine is."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def clock_of(store: Store) -> Any:
    """The present time by the clock of S3, which counts whole seconds."""
    store.write_text("clock/now", "")
    return store.texts("clock")["now"]


def test_who_loses_leaves_no_claim_behind(claims: Claims, store: Store) -> None:
    run = claims.take("small", "k")
    claims.take("small", "k")
    assert set(store.texts("claims/small/k")) == {f"{run}.json"}


def test_a_claim_ends_with_its_lease_and_counts_as_an_attempt(store: Store) -> None:
    dead = Claims(store, timedelta(seconds=-1), settle=0.0)
    for _ in range(ATTEMPTS):
        assert dead.standing("small", "k").state == "free"
        assert dead.take("small", "k")
    found = dead.standing("small", "k")
    assert found.state == "failed"
    assert f"given up after {ATTEMPTS} attempts" in found.detail
    assert "reported no end" in found.detail


def test_a_lease_is_renewed_while_the_work_goes_on(store: Store) -> None:
    short = Claims(store, timedelta(seconds=0.9), settle=0.0)
    run = short.take("small", "k")
    assert run

    def lease_ends() -> datetime:
        text = store.read_text(f"claims/small/k/{run}.json")
        assert text
        return Claim.model_validate_json(text).until

    taken = lease_ends()
    with short.held("small", "k", run):
        wait_until(lambda: lease_ends() > taken)


def expire(store: Store, run: str) -> None:
    """Let the lease of a run end now, as if its machine had slept."""
    over = Claim(state="working", until=store.clock() - timedelta(seconds=1))
    store.write_text(f"claims/small/k/{run}.json", over.model_dump_json())


def test_a_lease_that_expired_is_renewed_unless_another_watcher_took_the_item(claims: Claims, store: Store) -> None:
    first = claims.take("small", "k")
    assert first
    expire(store, first)
    assert claims.keep("small", "k", first)
    assert claims.take("small", "k") is None

    expire(store, first)
    assert claims.standing("small", "k").state == "free"
    second = claims.take("small", "k")
    assert second
    assert not claims.keep("small", "k", first)
    assert claims.keep("small", "k", second)
    assert f"by the run {second}" in claims.standing("small", "k").detail


def test_a_claim_that_was_deleted_is_not_renewed(claims: Claims, store: Store) -> None:
    run = claims.take("small", "k")
    assert run
    claims.clear("small", "k")
    assert not claims.keep("small", "k", run)
    assert store.texts("claims/small/k") == {}


def test_a_lasting_failure_is_remembered_with_its_reason(claims: Claims) -> None:
    run = claims.take("small", "k")
    assert run
    claims.fail("small", "k", run, LASTING)
    found = claims.standing("small", "k")
    assert (found.state, found.detail) == ("failed", "pin: the family is not known")
    assert claims.standing("small", "the key of other code").state == "free"


def test_a_passing_failure_is_tried_again_a_few_times(claims: Claims) -> None:
    for _ in range(ATTEMPTS):
        assert claims.standing("small", "k").state == "free"
        run = claims.take("small", "k")
        assert run
        claims.fail("small", "k", run, PASSING)
    found = claims.standing("small", "k")
    assert found.state == "failed"
    assert "OutOfMemoryError" in found.detail


def test_a_person_can_have_it_tried_again(claims: Claims) -> None:
    run = claims.take("small", "k")
    assert run
    claims.fail("small", "k", run, LASTING)
    claims.clear("small", "k")
    assert claims.standing("small", "k").state == "free"


@pytest.mark.parametrize(
    ("error", "state"), [(Refusal("no such family"), "failed"), (Unavailable("S3 is away"), "free")]
)
def test_a_run_on_a_cluster_is_settled_by_the_next_watcher(claims: Claims, error: Refusal, state: str) -> None:
    run = claims.take("small", "k")
    assert run
    leave_failure(run, "pin", error)
    # Kubeflow may start the stage again: only when the run has ended is the failure its end.
    assert claims.standing("small", "k").state == "claimed"
    leave_end(run, succeeded=False)
    assert claims.standing("small", "k").state == state


def test_a_stage_that_failed_and_was_tried_again_with_success_is_no_failure(claims: Claims) -> None:
    run = claims.take("small", "k")
    assert run
    leave_failure(run, "evaluate", RuntimeError("the node went away"))
    leave_end(run, succeeded=True)
    assert claims.standing("small", "k").state == "free"


@pytest.mark.parametrize("minutes", [-20, 20])
def test_a_watcher_whose_clock_is_wrong_neither_takes_nor_loses_a_claim(
    minutes: int, claims: Claims, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(minutes=minutes)

    short = Claims(store, timedelta(minutes=10), settle=0.0)
    assert short.take("small", "of a right clock")
    with monkeypatch.context() as patch:
        for module in (claims_module, store_module):
            patch.setattr(module, "datetime", Wrong)
        assert short.take("small", "of a wrong clock")
        assert short.standing("small", "of a right clock").state == "claimed"
    assert short.standing("small", "of a wrong clock").state == "claimed"


def test_an_asker_that_died_is_forgotten(claims: Claims, store: Store) -> None:
    past = datetime.now(UTC) - timedelta(minutes=2)
    dead = Claim(state="asking", until=past)
    store.write_text("claims/small/k/small-dead.json", dead.model_dump_json())
    assert claims.standing("small", "k").state == "free"
    assert claims.take("small", "k")


def test_the_earlier_asker_wins(store: Store) -> None:
    asking = Claim(state="asking", until=datetime.now(UTC) + timedelta(minutes=1))
    store.write_text("claims/small/k/zzz.json", asking.model_dump_json())
    wait_until(lambda: clock_of(store) > store.texts("claims/small/k")["zzz.json"])
    assert Claims(store, HOUR, settle=0.0).take("small", "k") is None


def _race(start: Barrier, results: "multiprocessing.Queue[str | None]") -> None:
    claims = Claims(Store.from_environment(), HOUR, settle=2.0)
    start.wait(timeout=240)
    results.put(claims.take("small", "k"))


def test_of_watchers_that_ask_at_once_one_has_it(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str | None] = context.Queue()
    start = context.Barrier(4)
    racers = [context.Process(target=_race, args=(start, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    answers = [results.get(timeout=300) for _ in racers]
    for racer in racers:
        racer.join()
    assert sum(answer is not None for answer in answers) == 1, answers
