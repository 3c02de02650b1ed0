"""What a registered version's tags tell, and which version is the challenger, in a real registry."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from components.lib.store.store import Reference
from components.lib.tracking import registry, runs
from components.lib.tracking.client import client
from components.register.report import Registered, Report
from components.register.run import _register, removed
from tests.components.register.conftest import ENVIRONMENT, build_both, build_channels

TEXTS = {f"evaluate.perplexity.{text}": f"s3://b/{text}@sha256:{'e' * 64}" for text in ("wikitext2", "technical")}

Register = Callable[..., Registered]


def test_layers_are_named_and_channels_counted(report: Report, tmp_path: Path) -> None:
    assert removed(report) == "layers 4, 7, 9"
    assert removed(build_channels(tmp_path)) == "hidden 64 of 256; ffn 172 of 684"
    assert removed(build_both(tmp_path)) == "layers 4, 7, 9; ffn 172 of 684"


class TestTheChallenger:
    @pytest.fixture
    def name(self, environment: dict[str, str]) -> str:
        """A registered model that no other test uses: the registry is shared."""
        return f"model-{uuid.uuid4().hex}"

    @pytest.fixture
    def register(self, name: str, report: Report) -> Register:
        """Register the checkpoint with this letter for a digest, judged as `passed` says in the evaluation `judged`."""
        runs.open_parent("one", {}, {})

        def register(letter: str, passed: bool, judged: str = "f") -> Registered:
            verdict = report.verdict.model_copy(update={"passed": passed})
            environment = {**ENVIRONMENT, "texts": TEXTS}
            judgement = report.model_copy(update={"verdict": verdict, "environment": environment})
            candidate = Reference(f"s3://b/stages/prune/{letter}", letter * 64)
            evaluation = Reference(f"s3://b/stages/evaluate/{judged}", judged * 64)
            return _register(name, "one", candidate, evaluation, judgement)

        return register

    @staticmethod
    def challenger(name: str) -> str | None:
        found = registry.aliased(name, "challenger")
        return found.version if found else None

    def test_is_a_version_that_passes(self, name: str, register: Register) -> None:
        made = register("a", passed=True)
        assert (made.version, made.aliases) == ("1", ("challenger",))
        assert registry.version_of(name, "1").tags["espalier.verdict"] == "pass"

    def test_is_the_newest_of_those_that_pass(self, name: str, register: Register) -> None:
        register("a", passed=True)
        assert register("b", passed=True).aliases == ("challenger",)
        assert self.challenger(name) == "2"

    def test_is_not_a_version_that_fails(self, name: str, register: Register) -> None:
        assert register("a", passed=False).aliases == ()
        assert self.challenger(name) is None
        assert registry.version_of(name, "1").tags["espalier.verdict"] == "fail"

    def test_stays_if_another_version_fails(self, name: str, register: Register) -> None:
        register("a", passed=True)
        register("b", passed=False)
        assert self.challenger(name) == "1"

    def test_that_fails_when_it_is_judged_again_is_none(self, name: str, register: Register) -> None:
        register("a", passed=True)
        again = register("a", passed=False, judged="d")
        assert (again.version, again.aliases) == ("1", ())
        assert self.challenger(name) is None

    def test_registered_again_is_the_same_version_with_the_same_evidence(self, name: str, register: Register) -> None:
        register("a", passed=True)
        first = registry.version_of(name, "1").tags["espalier.logged_model"]
        again = register("a", passed=True)
        assert (again.version, again.aliases) == ("1", ("challenger",))
        assert registry.version_of(name, "1").tags["espalier.logged_model"] == first
        assert len(client().search_model_versions(f"name = '{name}'")) == 1

    def test_measured_again_has_the_new_evidence(self, name: str, register: Register) -> None:
        register("a", passed=True)
        first = registry.version_of(name, "1").tags
        register("a", passed=True, judged="d")
        now = registry.version_of(name, "1").tags
        assert now["espalier.evaluation"] == "d" * 64 != first["espalier.evaluation"]
        assert now["espalier.logged_model"] != first["espalier.logged_model"]

    @pytest.mark.parametrize("passed", [True, False])
    def test_is_never_the_champion_which_stays_champion(self, passed: bool, name: str, register: Register) -> None:
        register("a", passed=True)
        registry.set_alias(name, "champion", "1")
        registry.drop_alias(name, "challenger", "1")
        assert register("a", passed=passed, judged="d").aliases == ("champion",)
        assert self.challenger(name) is None
