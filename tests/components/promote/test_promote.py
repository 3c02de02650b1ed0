"""The champion is a version that held its rules and whose files are whole; the one before it is kept as the way back."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from components.lib.errors import Refusal
from components.lib.store import s3
from components.lib.store.store import Store
from components.lib.tracking import registry, runs
from components.lib.tracking.registry import Version
from components.promote.promote import promote


@pytest.fixture
def name(environment: dict[str, str]) -> str:
    """A registered model that no other test uses: the registry is shared."""
    return f"model-{uuid.uuid4().hex}"


@pytest.fixture
def register(name: str, tmp_path: Path) -> Callable[..., Version]:
    """Register a checkpoint of one file, with its verdict."""
    run = runs.open_parent("one", {}, {})

    def register(content: str, verdict: str | None = "pass") -> Version:
        weights = tmp_path / content / "model/weights"
        weights.parent.mkdir(parents=True)
        weights.write_text(content)
        reference = Store.from_environment().put_content(tmp_path / content, "stages/prune")
        tags = {"espalier.verdict": verdict} if verdict else {}
        return registry.register_version(name, reference, run, tags)

    return register


def aliases(name: str) -> dict[str, str]:
    found = {alias: registry.aliased(name, alias) for alias in ("champion", "previous", "challenger")}
    return {alias: version.version for alias, version in found.items() if version}


def test_the_challenger_becomes_champion(name: str, register: Callable[..., Version]) -> None:
    registry.set_alias(name, "challenger", register("first").version)
    champion = promote(name)
    assert (champion.version, champion.aliases) == ("1", ("champion",))
    assert aliases(name) == {"champion": "1"}


def test_the_champion_before_it_is_kept_and_can_come_back(name: str, register: Callable[..., Version]) -> None:
    for content in ("first", "second"):
        promote(name, register(content).version)
    assert aliases(name) == {"champion": "2", "previous": "1"}
    promote(name, "1")
    assert aliases(name) == {"champion": "1", "previous": "2"}


def test_to_promote_the_champion_again_loses_no_way_back(name: str, register: Callable[..., Version]) -> None:
    for content in ("first", "second"):
        promote(name, register(content).version)
    promote(name, "2")
    assert aliases(name) == {"champion": "2", "previous": "1"}


def test_another_challenger_stays_one(name: str, register: Callable[..., Version]) -> None:
    register("first")
    registry.set_alias(name, "challenger", register("second").version)
    promote(name, "1")
    assert aliases(name) == {"champion": "1", "challenger": "2"}


@pytest.mark.parametrize("damage", ["differs", "missing"])
def test_a_version_whose_files_are_not_what_was_measured_is_refused(
    damage: str, name: str, register: Callable[..., Version]
) -> None:
    promote(name, register("first").version)
    second = register("second")
    bucket, prefix = s3.split(second.source)
    weights = s3.client(s3.PATIENT)
    if damage == "differs":
        weights.put_object(Bucket=bucket, Key=f"{prefix}/weights", Body=b"SECOND")
    else:
        weights.delete_object(Bucket=bucket, Key=f"{prefix}/weights")
    with pytest.raises(Refusal, match=r"model/weights"):
        promote(name, second.version)
    assert aliases(name) == {"champion": "1"}


@pytest.mark.parametrize("verdict", ["fail", None])
def test_a_version_that_did_not_hold_its_rules_is_refused_unless_it_is_forced(
    verdict: str | None, name: str, register: Callable[..., Version]
) -> None:
    register("first", verdict)
    with pytest.raises(Refusal, match=rf"version 1 of {name} has the verdict {verdict or 'missing'}: pass --force"):
        promote(name, "1")
    assert aliases(name) == {}
    assert promote(name, "1", force=True).aliases == ("champion",)


def test_nothing_is_promoted_where_nothing_challenges(name: str, register: Callable[..., Version]) -> None:
    register("first")
    with pytest.raises(Refusal, match=rf"'{name}' has no challenger: name a version \(--version\)"):
        promote(name)


def test_a_version_that_is_not_there_is_refused(name: str, register: Callable[..., Version]) -> None:
    register("first")
    with pytest.raises(Refusal, match=rf"no version 2 of {name}: it has 1"):
        promote(name, "2")
