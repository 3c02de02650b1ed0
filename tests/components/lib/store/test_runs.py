"""How a run ended, as a later process reads it."""

from __future__ import annotations

import errno

import pytest

from components.lib.stage.events import reported
from components.lib.store.runs import Ending, ending, forget, leave_end, leave_unregistered, newest_stage
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


def test_a_run_shows_its_newest_stage_and_an_attempt_forgets_the_one_before(store: Store) -> None:
    assert newest_stage("one", store) == ""
    with reported("pin", "one"):
        pass
    with pytest.raises(KeyError), reported("control dense-trained", "one"):
        raise KeyError("layer")
    leave_end("one", succeeded=False)
    assert newest_stage("one", store) == "control dense-trained"
    assert ending("one", store) == Ending(succeeded=False, stage="control dense-trained", reason="KeyError: 'layer'")
    forget("one", store)
    assert (newest_stage("one", store), ending("one", store)) == ("", None)


def test_a_disk_that_is_full_is_told_in_a_sentence_and_is_no_lasting_failure(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match="No space left"), reported("prune", "one"):
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/model.safetensors")
    leave_end("one", succeeded=False)
    ended = ending("one", store)
    assert ended
    assert (ended.stage, ended.lasting) == ("prune", False)
    assert ended.reason.startswith("the disk is full for /scratch/model.safetensors")
    assert '"event": "refused"' in capsys.readouterr().out
