"""What is new: by the key of what would be made, against the registry, downloading nothing."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import boto3
import pytest

from components.lib.recipe.loading import parse_recipe
from components.lib.stage.code import Code
from components.lib.store.claims import Claims
from components.lib.store.runs import Ending
from components.lib.store.store import Reference, Store
from components.lib.tracking import client, registry
from components.pin.pin import pin_folder
from components.watch import find
from components.watch.find import Watched, find_new, identify, look, table, take
from tests.components.lib.transformer.zoo import Specimen
from tests.components.lib.transformer.zoo import release as make_release

RECIPE = """
methods: {shortgpt: {ratio: 0.25}}
calibration: {data: TEXT, length: 16}
regularize: {schedule: none}
evaluate: {perplexity: {text: TEXT}}
"""
HOUR = timedelta(hours=1)


@pytest.fixture
def store(environment: dict[str, str]) -> Store:
    return Store.from_environment()


@pytest.fixture
def claims(store: Store) -> Claims:
    return Claims(store, HOUR, settle=0.0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Some words to calibrate on.")
    return file


@pytest.fixture
def release(store: Store) -> str:
    """A release on S3 that nobody could download: it is a configuration alone."""
    put(store, "release/config.json", "{}")
    return store.uri("release")


@pytest.fixture
def watched(release: str, text: Path, store: Store) -> Watched:
    return Watched(release=release, name=store.prefix, recipe=RECIPE.replace("TEXT", str(text)))


def put(store: Store, name: str, content: str) -> None:
    boto3.session.Session().client("s3").put_object(
        Bucket=store.bucket, Key=f"{store.prefix}/{name}", Body=content.encode()
    )


def register(name: str, key: str, digest: str = "d" * 64) -> registry.Version:
    reference = Reference("s3://bucket/made", digest)
    return registry.register_version(name, reference, "", {f"{registry.ITEM}.{key}": "made"})


def test_the_same_question_has_the_same_key(watched: Watched, store: Store) -> None:
    assert identify(watched, store) == identify(watched, store)


def on(watched: Watched, *reasons: str) -> Watched:
    return Watched.model_validate(watched.model_dump() | {"recompress_on": reasons})


def test_a_release_is_new_at_another_revision_and_for_no_other_reason_unless_asked(
    watched: Watched, store: Store, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identify(watched, store).key
    text.write_text("Other words.")
    assert identify(watched, store).key == first
    other = watched.model_copy(update={"recipe": watched.recipe.replace("0.25", "0.5")})
    assert identify(other, store).key == first
    monkeypatch.setattr(find, "code_of", lambda stage: Code({stage: "other"}, {}))
    assert identify(watched, store).key == first
    put(store, "release/config.json", '{"another": "revision"}')
    assert identify(watched, store).key != first


def test_every_part_of_the_key_makes_something_new_if_asked(
    watched: Watched, store: Store, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = on(watched, "release", "recipe", "code")
    keys = [identify(watched, store).key]
    put(store, "release/config.json", '{"another": "revision"}')
    keys.append(identify(watched, store).key)
    text.write_text("Other words.")
    keys.append(identify(watched, store).key)
    other = watched.model_copy(update={"recipe": watched.recipe.replace("0.25", "0.5")})
    keys.append(identify(other, store).key)
    monkeypatch.setattr(find, "code_of", lambda stage: Code({stage: "other"}, {}))
    keys.append(identify(watched, store).key)
    assert len(set(keys)) == len(keys)


def test_the_code_is_that_of_the_stages_that_shape_a_version(
    watched: Watched, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def code_of(stage: str) -> Code:
        asked.append(stage)
        return Code({}, {})

    monkeypatch.setattr(find, "code_of", code_of)
    identify(on(watched, "release", "code"), store)
    assert {"learn_gates", "prune", "evaluate"} <= set(asked)
    assert not {"watch", "promote", "finish"} & set(asked)


def test_the_policy_always_holds_the_release(watched: Watched) -> None:
    with pytest.raises(ValueError, match="always holds release"):
        on(watched, "recipe")
    assert on(watched, "code", "release").recompress_on == on(watched, "release", "code").recompress_on


def test_a_text_is_known_by_its_content_wherever_it_lies(watched: Watched, store: Store, text: Path) -> None:
    moved = text.rename(text.with_name("moved.txt"))
    other = watched.model_copy(update={"recipe": RECIPE.replace("TEXT", str(moved))})
    moved_key = identify(other, store).key
    moved.rename(text)
    assert identify(watched, store).key == moved_key


def test_a_folder_is_known_by_the_digest_that_it_has_in_the_store(
    tmp_path: Path, watched: Watched, store: Store
) -> None:
    folder = make_release(Specimen("llama", "llama").model(layers=4), tmp_path / "model")
    (folder / "pytorch_model.bin").write_text("is no part of a release")
    item = identify(watched.model_copy(update={"release": str(folder)}), store)
    recipe = parse_recipe(watched.recipe, ["evaluate.speed.enabled=false"])  # its prompt is too long for this model
    assert item.revision == pin_folder(folder, recipe, store).digest
    (folder / "generation_config.json").write_text("{}")
    assert identify(watched.model_copy(update={"release": str(folder)}), store).key != item.key


def test_a_registered_model_is_watched_by_its_alias(watched: Watched, release: str, store: Store) -> None:
    source = f"source-{store.prefix}"
    for number in (1, 2):
        put(store, f"version-{number}/config.json", json.dumps({"version": number}))
        client.client().create_registered_model(source) if number == 1 else None
        client.client().create_model_version(source, store.uri(f"version-{number}"))
    following = watched.model_copy(update={"release": f"models:/{source}@champion"})
    registry.set_alias(source, "champion", "1")
    first = identify(following, store)
    registry.set_alias(source, "champion", "2")
    second = identify(following, store)
    assert (first.release, second.release) == (f"models:/{source}/1", f"models:/{source}/2")
    assert first.key != second.key


def test_what_is_registered_is_not_new(watched: Watched, store: Store, claims: Claims) -> None:
    assert look(watched, store, claims).state == "new"
    item = identify(watched, store)
    version = register(item.name, item.key)
    found = look(watched, store, claims)
    assert (found.state, found.detail) == ("registered", f"as version {version.version}")


def test_a_source_that_is_not_to_be_had_is_told_and_stops_no_other(watched: Watched, store: Store) -> None:
    gone = watched.model_copy(update={"release": store.uri("nothing-here")})
    runs, findings = find_new([gone.model_dump(), watched.model_dump()], 5, HOUR)
    assert [finding.state for finding in findings] == ["refused", "new"]
    assert "nothing-here" in findings[0].detail
    assert [run["release"] for run in runs] == [watched.release]
    page = table(findings, runs)
    assert "refused" in page
    assert "**taken**" in page


def test_at_most_so_many_are_taken_and_the_rest_next_time(
    watched: Watched, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "Claims", partial(Claims, settle=0.0))
    sources = []
    for number in range(3):
        put(store, f"release-{number}/config.json", str(number))
        sources.append(watched.model_copy(update={"release": store.uri(f"release-{number}")}).model_dump())
    first, _ = find_new(sources, 2, HOUR)
    second, _ = find_new(sources, 2, HOUR)
    third, findings = find_new(sources, 2, HOUR)
    assert [run["release"][-1] for run in first + second] == ["0", "1", "2"]
    assert third == []
    assert {finding.state for finding in findings} == {"claimed"}
    assert set(first[0]) == {"release", "recipe", "model", "run"}


def test_what_was_registered_while_it_was_being_claimed_is_left_alone(
    watched: Watched, store: Store, claims: Claims
) -> None:
    item = identify(watched, store)
    register(item.name, item.key)
    assert take(item, claims) is None
    assert store.texts(f"claims/{item.name}/{item.claim}") == {}


def test_a_version_that_a_person_deleted_is_made_again(watched: Watched, store: Store, claims: Claims) -> None:
    item = identify(watched, store)
    version = register(item.name, item.key)
    assert look(watched, store, claims).state == "registered"
    client.client().delete_model_version(item.name, version.version)
    assert look(watched, store, claims).state == "new"


def test_a_lasting_failure_is_told_until_the_recipe_changes(watched: Watched, store: Store, claims: Claims) -> None:
    item = identify(watched, store)
    run = take(item, claims)
    assert run
    claims.fail(item.name, item.claim, run, Ending(succeeded=False, stage="pin", reason="no such family", lasting=True))
    assert (look(watched, store, claims).state, look(watched, store, claims).detail) == (
        "failed",
        "pin: no such family",
    )
    other = watched.model_copy(update={"recipe": watched.recipe.replace("0.25", "0.5")})
    assert look(other, store, claims).state == "new"


def test_runs_that_register_the_same_checkpoint_at_once_make_one_version(store: Store) -> None:
    """The claim spares work; this is what keeps versions apart where a claim was lost."""
    name, together = f"race-{store.prefix}", threading.Barrier(4)

    def racer(_: int) -> str:
        together.wait()
        return register(name, "k").version

    with ThreadPoolExecutor(4) as racers:
        answers = set(racers.map(racer, range(4)))
    left = client.client().search_model_versions(f"name = '{name}'")
    assert [str(version.version) for version in left] == list(answers)
