"""The watcher on this machine: what it does with each end that a run can come to. The runs here end as they are told to."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from rich.console import Console

from components.lib.errors import Refusal, StageFailed, Unavailable
from components.lib.store import claims
from components.lib.store.claims import ATTEMPTS
from components.lib.store.runs import item_of
from components.lib.store.store import Reference, Store
from components.lib.tracking import registry
from components.watch.find import Watched
from pipeline.cli.watch import status
from pipeline.runners import watch as watch_local
from pipeline.runners.watch import Outcome, watch_once
from tests.components.register.test_searched import reported

RECIPE = """
methods: {sleb: {ratio: 0.25}}
calibration: {data: TEXT, length: 16}
regularize: {schedule: none}
evaluate: {perplexity: {text: TEXT}}
"""
End = Callable[[], Any]


@pytest.fixture
def store(environment: dict[str, str]) -> Store:
    return Store.from_environment()


@pytest.fixture
def watched(store: Store, tmp_path: Path) -> Watched:
    text = tmp_path / "text.txt"
    text.write_text("Some words.")
    key = f"{store.prefix}/release/config.json"
    boto3.session.Session().client("s3").put_object(Bucket=store.bucket, Key=key, Body=b"{}")
    return Watched(release=store.uri("release"), name=store.prefix, recipe=RECIPE.replace("TEXT", str(text)))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the runs that were made; `ending` says how they end."""
    monkeypatch.setattr(watch_local, "Claims", lambda store, lease: claims.Claims(store, lease, settle=0.0))
    return []


@pytest.fixture
def ending(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[End], None]:
    def ends(how: End) -> None:
        def run(recipe: Any, release: str, name: str, home: Path, console: Console, label: str) -> Any:
            runs.append(label)
            return how()

        monkeypatch.setattr(watch_local, "run", run)

    return ends


def failing(error: BaseException) -> End:
    def end() -> Any:
        raise error

    return end


def look(tmp_path: Path, *watched: Watched, **more: Any) -> list[Outcome]:
    return watch_once(watched, 1, tmp_path, Console(quiet=True), **more)


@pytest.mark.parametrize(("passed", "state", "code"), [(True, "pass", 0), (False, "fail", 3)])
def test_a_new_release_is_recompressed_and_then_known(
    watched: Watched,
    store: Store,
    runs: list[str],
    ending: Callable[[End], None],
    tmp_path: Path,
    passed: bool,
    state: str,
    code: int,
) -> None:
    def registers() -> Any:
        # As the stage register does: a version is made whatever the verdict, and bears the item's key.
        tags = {f"{registry.ITEM}.{item_of(runs[-1], store)}": "made"}
        version = registry.register_version(watched.name, Reference("s3://b/made", "d" * 64), "", tags).version
        report = SimpleNamespace(registered=SimpleNamespace(version=version), verdict=SimpleNamespace(passed=passed))
        return SimpleNamespace(report=report, folder=tmp_path)

    ending(registers)
    first = look(tmp_path, watched, watched)
    again = look(tmp_path, watched)
    assert [outcome.state for outcome in first] == [state, state], "what is listed twice is made once"
    assert [outcome.state for outcome in again] == ["registered"]
    assert (status(first), status(again)) == (code, 0)
    assert len(runs) == 1
    assert store.texts(f"claims/{watched.name}") == {}


def test_a_target_that_does_not_hold_is_tried_once_and_told_again(
    watched: Watched, runs: list[str], ending: Callable[[End], None], tmp_path: Path
) -> None:
    report = reported(tmp_path / "run", 1.1).model_copy(update={"registered": None})
    ending(lambda: SimpleNamespace(report=report, folder=tmp_path))
    first, again = look(tmp_path, watched), look(tmp_path, watched)
    assert len(runs) == 1
    assert ([outcome.state for outcome in first + again], status(first), status(again)) == (["fail", "failed"], 3, 0)
    assert "ask for methods.trsp.ratio 0.125" in again[0].detail


def test_a_lasting_failure_is_tried_once_and_told_again(
    watched: Watched, runs: list[str], ending: Callable[[End], None], tmp_path: Path
) -> None:
    ending(failing(Refusal("the family 'bert' is not known")))
    first, again = look(tmp_path, watched), look(tmp_path, watched)
    assert len(runs) == 1
    assert [outcome.state for outcome in first + again] == ["failed", "failed"]
    assert "bert" in again[0].detail
    assert (status(first), status(again)) == (1, 0)
    other = watched.model_copy(update={"recipe": watched.recipe.replace("0.25", "0.5")})
    look(tmp_path, other)
    assert len(runs) == 2, "another recipe is another item"


def test_a_person_may_have_it_tried_again(
    watched: Watched, runs: list[str], ending: Callable[[End], None], tmp_path: Path
) -> None:
    ending(failing(Refusal("this machine has no GPU")))
    look(tmp_path, watched)
    look(tmp_path, watched, retry=True)
    assert len(runs) == 2


@pytest.mark.parametrize("error", [Unavailable("S3 is away"), MemoryError()])
def test_a_passing_failure_is_tried_again_a_few_times(
    watched: Watched, runs: list[str], ending: Callable[[End], None], tmp_path: Path, error: Exception
) -> None:
    ending(failing(error))
    for _ in range(ATTEMPTS + 2):
        outcomes = look(tmp_path, watched)
    assert len(runs) == ATTEMPTS
    assert "given up" in outcomes[0].detail


def test_what_is_broken_off_is_free_at_once(
    watched: Watched, runs: list[str], ending: Callable[[End], None], tmp_path: Path
) -> None:
    ending(failing(KeyboardInterrupt()))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            look(tmp_path, watched)
    assert len(runs) == 2


def test_one_source_that_is_not_to_be_had_stops_no_other(
    watched: Watched, store: Store, runs: list[str], ending: Callable[[End], None], tmp_path: Path
) -> None:
    ending(failing(StageFailed("evaluate: killed")))
    gone = watched.model_copy(update={"release": store.uri("nothing")})
    outcomes = look(tmp_path, gone, watched)
    assert [outcome.state for outcome in outcomes] == ["refused", "failed"]
    assert len(runs) == 1
    assert status(outcomes) == 1


def test_a_watcher_that_lost_its_lease_before_it_registers_makes_no_second_version(
    watched: Watched, store: Store, runs: list[str], ending: Callable[[End], None], tmp_path: Path
) -> None:
    def registers(label: str) -> Any:
        tags = {f"{registry.ITEM}.{item_of(label, store)}": "made", "espalier.run": label}
        reference = Reference("s3://b/made", ("a" if label == runs[0] else "b") * 64)
        version = registry.register_version(watched.name, reference, "", tags)
        return SimpleNamespace(
            report=SimpleNamespace(registered=version, verdict=SimpleNamespace(passed=True)), folder=tmp_path
        )

    second: list[Outcome] = []

    def starves() -> Any:
        if len(runs) == 1:
            [name] = [place for place, *_ in store.objects(f"claims/{watched.name}")]
            over = claims.Claim(state="working", until=store.clock() - timedelta(seconds=1))
            store.write_text(name, over.model_dump_json())
            second.extend(look(tmp_path, watched))
            return registers(runs[0])
        return registers(runs[1])

    ending(starves)
    first = look(tmp_path, watched)
    assert ([one.state for one in second], [one.state for one in first]) == (["pass"], ["registered"])
    [version] = registry.versions(watched.name)
    assert version.tags["espalier.run"] == runs[1]
    assert status(first) == 0
    assert store.texts(f"claims/{watched.name}") == {}
