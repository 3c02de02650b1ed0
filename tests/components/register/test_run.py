"""What a registered version's tags tell, and which version is the challenger, in a real registry."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from components.lib.store.store import Manifest, Reference
from components.lib.tracking import registry, runs
from components.lib.tracking.client import client
from components.register.description import PICTURE
from components.register.report import Registered, Report
from components.register.run import Made, _register, _release, decision, removed
from tests.components.register.conftest import ENVIRONMENT, build_both, build_channels

TEXTS = {f"evaluate.perplexity.{text}": f"s3://b/{text}@sha256:{'e' * 64}" for text in ("wikitext2", "technical")}

Register = Callable[..., Registered]


def test_layers_are_named_and_channels_counted(report: Report, tmp_path: Path) -> None:
    assert removed(report) == "layers 4, 7, 9"
    assert removed(build_channels(tmp_path)) == "hidden 64 of 256; ffn 172 of 684"
    assert removed(build_both(tmp_path)) == "layers 4, 7, 9; ffn 172 of 684"


@pytest.mark.parametrize(
    ("snapshot", "told"),
    [
        ({}, ()),
        ({"dequantised": "fp8"}, ("dequantised from FP8 to bf16",)),
        ({"taken_out_of": "Gemma 3"}, ("the text model alone of a Gemma 3",)),
        (
            {"gguf": "Q8_0", "heads": ["blk.4.nextn.eh_proj.weight"]},
            (
                "unpacked from a GGUF file with weights in Q8_0",
                "without its heads for multi-token prediction (1 tensor)",
            ),
        ),
    ],
)
def test_what_was_changed_of_the_release_when_it_was_pinned_is_told(
    snapshot: dict[str, object], told: tuple[str, ...]
) -> None:
    """The dense model is what was pinned, and its figures are not the source's if that was quantised."""
    manifest = Manifest(files=(), metadata={"source": "a/b", "revision": None, **snapshot})
    assert _release(Reference("s3://b/releases/x", "a" * 64), manifest)["changed"] == told


@pytest.mark.parametrize(
    ("approval", "passed", "aliases", "what"),
    [
        ("auto", True, ("challenger",), "promote"),
        ("auto", True, ("champion",), "pass"),
        ("auto", False, (), "fail"),
        ("manual", True, ("challenger",), "pass"),
    ],
)
def test_the_pipeline_promotes_what_passes_if_the_recipe_approves(
    approval: str, passed: bool, aliases: tuple[str, ...], what: str, report: Report
) -> None:
    assert report.registered
    recipe = {**report.recipe, "promote": {**report.recipe["promote"], "approval": approval}}
    changed = {
        "recipe": recipe,
        "verdict": report.verdict.model_copy(update={"passed": passed}),
        "registered": report.registered.model_copy(update={"aliases": aliases}),
    }
    assert decision(report.model_copy(update=changed)) == what


def test_the_pipeline_promotes_nothing_that_is_not_registered(report: Report) -> None:
    recipe = {**report.recipe, "promote": {**report.recipe["promote"], "approval": "auto"}}
    assert decision(report.model_copy(update={"recipe": recipe, "registered": None})) == "pass"


class TestTheChallenger:
    @pytest.fixture
    def name(self, environment: dict[str, str]) -> str:
        """A registered model that no other test uses: the registry is shared."""
        return f"model-{uuid.uuid4().hex}"

    @pytest.fixture
    def register(self, name: str, report: Report) -> Register:
        """Register the checkpoint with this letter for a digest, judged as `passed` says in the evaluation `judged`."""
        runs.open_parent("one", {}, {})

        def register(letter: str, passed: bool, judged: str = "f", compared: Reference | None = None) -> Registered:
            verdict = report.verdict.model_copy(update={"passed": passed})
            environment = {**ENVIRONMENT, "texts": TEXTS, "code": {"all": "7" * 64}}
            judgement = report.model_copy(update={"verdict": verdict, "environment": environment})
            candidate = Reference(f"s3://b/stages/prune/{letter}", letter * 64)
            evaluation = Reference(f"s3://b/stages/evaluate/{judged}", judged * 64)
            inputs = {"models/champion": str(compared)} if compared else {}
            metadata = {"candidate": {"key": "9" * 64}, "evaluation": {"inputs": inputs}}
            manifests = {output: Manifest(files=(), metadata=told) for output, told in metadata.items()}
            return _register(name, "one", Made(candidate, evaluation, manifests), judgement)

        return register

    @staticmethod
    def challenger(name: str) -> str | None:
        found = registry.aliased(name, "challenger")
        return found.version if found else None

    def test_is_a_version_that_passes(self, name: str, register: Register) -> None:
        made = register("a", passed=True)
        assert (made.version, made.aliases) == ("1", ("challenger",))
        assert registry.version_of(name, "1").tags["espalier.verdict"] == "pass"

    def test_has_its_evidence_as_tags_words_before_digests(self, name: str, register: Register) -> None:
        register("a", passed=True)
        tags = registry.version_of(name, "1").tags
        told = {
            "espalier.release": "models/reference-llama",
            "espalier.revision": "None",
            "espalier.method": "trsp",
            "espalier.ratio": "trsp 0.25",
            "espalier.removed": "layers 4, 7, 9",
            "espalier.verdict": "pass",
            "espalier.failed": "none",
            "perplexity.wikitext2": "58.72 (dense 59.41)",
            "sha256.checkpoint": "a" * 64,
            "sha256.code": "7" * 64,
            "sha256.compared_with": "none",
            "sha256.evaluation": f"s3://b/stages/evaluate/f@sha256:{'f' * 64}",
            "sha256.key": "9" * 64,
        }
        assert {tag: tags.get(tag) for tag in told} == told
        assert {"espalier.run", "espalier.version", "espalier.commit", "sha256.release"} <= set(tags)
        told = list(client().get_model_version(name, "1").tags)
        digests = [tag for tag in told if re.fullmatch("[0-9a-f]{64}", tags[tag])]
        assert told[:3] == ["espalier.verdict", "espalier.failed", "perplexity.wikitext2"]
        assert told.index("espalier.recipe") < told.index(digests[0])

    def test_was_compared_with_a_champion(self, name: str, register: Register) -> None:
        register("a", passed=True, compared=Reference("s3://b/stages/prune/c", "c" * 64))
        assert registry.version_of(name, "1").tags[registry.COMPARED] == "c" * 64

    def test_is_described_with_a_table_the_rules_and_the_picture(self, name: str, register: Register) -> None:
        register("a", passed=True)
        text = client().get_model_version(name, "1").description
        assert text.startswith("**Pass**: all 10 rules hold.")
        assert "models/reference-llama without 3 of 12 layers. Methods: trsp 0.25." in text
        assert "|  | dense | candidate | champion | pruned-first | dense-trained |" in text
        assert "| perplexity wikitext2 | 59.41 | 58.72 (0.988×) | 63.05 (1.061×) |" in text
        assert "| quality[wikitext2] | 0.988×, asked at most 1.15× | holds | the answers must stay close |" in text
        run = runs.find_parent("one")
        assert run
        assert f"![size and perplexity](get-artifact?path={PICTURE}&run_uuid={run.info.run_id})" in text

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
        assert now["sha256.evaluation"].endswith("d" * 64) != first["sha256.evaluation"].endswith("d" * 64)
        assert now["espalier.logged_model"] != first["espalier.logged_model"]

    @pytest.mark.parametrize("passed", [True, False])
    def test_is_never_the_champion_which_stays_champion(self, passed: bool, name: str, register: Register) -> None:
        register("a", passed=True)
        registry.set_alias(name, "champion", "1")
        registry.drop_alias(name, "challenger", "1")
        assert register("a", passed=passed, judged="d").aliases == ("champion",)
        assert self.challenger(name) is None
