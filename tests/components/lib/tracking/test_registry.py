"""Versions and aliases, in a real registry."""

from __future__ import annotations

from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.lib.errors import Refusal, Unavailable
from components.lib.tracking import registry, runs
from tests.components.lib.tracking.given import AWAY, reference


class TestAVersion:
    @pytest.fixture
    def run(self, mlflow: MlflowClient) -> str:
        return runs.open_parent("one", {}, {})

    def test_is_the_checkpoints_prefix_with_its_evidence(self, name: str, run: str) -> None:
        version = registry.register_version(name, reference("a"), run, {"espalier.verdict": "pass"})
        assert (version.name, version.version) == (name, "1")
        assert version.source == f"{reference('a').uri}/model"
        assert version.reference == reference("a")
        assert version.tags["espalier.verdict"] == "pass"

    def test_is_the_same_one_however_often_it_is_registered(self, name: str, run: str, mlflow: MlflowClient) -> None:
        registry.register_version(name, reference("a"), run, {"espalier.verdict": "fail"})
        again = registry.register_version(name, reference("a", bucket="moved"), run, {"espalier.verdict": "pass"})
        assert (again.version, again.tags["espalier.verdict"]) == ("1", "pass")
        other = registry.register_version(name, reference("b"), run, {})
        assert other.version == "2"
        assert len(mlflow.search_model_versions(f"name = '{name}'")) == 2

    def test_that_two_made_at_once_is_the_older_one(
        self, name: str, run: str, mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry.register_version(name, reference("a"), run, {})
        # The other's version is seen only at the second look.
        monkeypatch.setattr(registry, "_search", _blind_once(registry._search))
        assert registry.register_version(name, reference("a"), run, {}).version == "1"
        assert len(mlflow.search_model_versions(f"name = '{name}'")) == 1

    def test_is_one_for_a_watched_item_whatever_its_checkpoint_is(
        self, name: str, run: str, mlflow: MlflowClient
    ) -> None:
        made = {f"{registry.ITEM}.k": "made", "espalier.run": "one"}
        registry.register_version(name, reference("a"), run, made)
        with pytest.raises(Unavailable, match=f"the run one registered version 1 of {name} for the same"):
            registry.register_version(name, reference("b"), run, {**made, "espalier.run": "two"})
        again = registry.register_version(name, reference("a"), run, {f"{registry.ITEM}.l": "made"})
        assert again.version == "1", "the same checkpoint for another item is the same version"
        [left] = mlflow.search_model_versions(f"name = '{name}'")
        assert left.tags["espalier.run"] == "one"

    def test_of_two_that_pass_the_first_look_together_is_the_older_one(
        self, name: str, run: str, mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = {f"{registry.ITEM}.k": "made"}
        registry.register_version(name, reference("a"), run, made)
        seen = registry._holder
        looks = iter([lambda *_: None, seen])
        monkeypatch.setattr(registry, "_holder", lambda *given: next(looks)(*given))
        with pytest.raises(Unavailable, match="version 1"):
            registry.register_version(name, reference("b"), run, made)
        assert [one.version for one in registry.versions(name)] == ["1"]

    def test_that_is_not_there_is_refused_with_those_that_are(self, name: str, run: str) -> None:
        with pytest.raises(Refusal, match=f"no version 7 of {name}: no model is registered under that name"):
            registry.version_of(name, "7")
        registry.register_version(name, reference("a"), run, {})
        registry.register_version(name, reference("b"), run, {})
        with pytest.raises(Refusal, match=f"no version 7 of {name}: it has 1, 2"):
            registry.version_of(name, "7")

    def test_is_found_by_the_run_that_registered_it(self, name: str, run: str) -> None:
        for letter, label in (("a", "one"), ("b", "two")):
            registry.register_version(name, reference(letter), run, {"espalier.run": label})
        assert registry.of_run(name, "one").version == "1"
        with pytest.raises(Refusal, match=f"the run three registered no version of {name}"):
            registry.of_run(name, "three")

    def test_that_others_registered_has_no_reference(self, name: str, mlflow: MlflowClient) -> None:
        mlflow.create_registered_model(name)
        mlflow.create_model_version(name, "s3://bucket/model")
        with pytest.raises(Refusal, match=r"has no tag espalier\.reference: it was not registered by espalier"):
            _ = registry.version_of(name, "1").reference

    def test_has_its_numbers_tied_to_their_data(self, name: str, run: str, mlflow: MlflowClient) -> None:
        model = registry.log_model_evidence(name, run, {"release": "r"}, {"perplexity.test": (12.5, "test", "d" * 64)})
        found = mlflow.get_logged_model(model)
        assert found.status == "READY"
        assert found.source_run_id == run
        (metric,) = found.metrics
        assert (metric.key, metric.value) == ("perplexity.test", 12.5)
        assert (metric.dataset_name, metric.dataset_digest) == ("test", "d" * 32)


def _blind_once(real: Any) -> Any:
    looks = iter([True])
    return lambda *asked: [] if next(looks, False) else real(*asked)


class TestAnAlias:
    @pytest.fixture(autouse=True)
    def _versions(self, name: str, mlflow: MlflowClient) -> None:
        run = runs.open_parent("one", {}, {})
        for letter in "ab":
            registry.register_version(name, reference(letter), run, {})

    def test_that_nobody_set_names_nothing(self, name: str) -> None:
        assert registry.aliased(name, "champion") is None
        assert registry.aliased("no-such-model", "champion") is None

    def test_of_a_server_that_is_away_is_an_error_and_not_nothing(self, name: str, away: pytest.MonkeyPatch) -> None:
        away.setenv(*AWAY)
        with pytest.raises(MlflowException):
            registry.aliased(name, "champion")
        with pytest.raises(MlflowException):
            registry.version_of(name, "1")

    def test_moves(self, name: str) -> None:
        registry.set_alias(name, "champion", "1")
        registry.set_alias(name, "champion", "2")
        champion = registry.aliased(name, "champion")
        assert champion is not None
        assert (champion.version, champion.aliases) == ("2", ("champion",))

    def test_is_not_set_again_since_webhooks_would_fire(
        self, name: str, mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry.set_alias(name, "champion", "1")
        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lambda *_: pytest.fail("set a second time"))
        registry.set_alias(name, "champion", "1")

    def test_is_dropped_only_from_the_version_that_has_it(self, name: str) -> None:
        registry.set_alias(name, "challenger", "2")
        registry.drop_alias(name, "challenger", "1")
        assert registry.aliased(name, "challenger") is not None
        registry.drop_alias(name, "challenger", "2")
        assert registry.aliased(name, "challenger") is None

    def test_is_how_a_version_is_found(self, name: str) -> None:
        registry.set_alias(name, "champion", "2")
        assert registry.find_version(f"{name}@champion").version == "2"
        assert registry.find_version(f"{name}@1").reference == reference("a")
        with pytest.raises(Refusal, match=rf"'{name}' has no alias 'previous': it has 1, 2 \(champion\)"):
            registry.find_version(f"{name}@previous")
        with pytest.raises(Refusal, match=r"'m' names no version: write NAME@alias"):
            registry.find_version("m")

    def test_is_listed_with_its_version(self, name: str) -> None:
        registry.set_alias(name, "champion", "2")
        registry.set_alias(name, "previous", "2")
        assert [(one.version, one.aliases) for one in registry.versions(name)] == [
            ("1", ()),
            ("2", ("champion", "previous")),
        ]
        assert registry.versions("no-such-model") == []
