"""How every stage runs: named by what it is made of, made once, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.schema import Target
from components.lib.stage import run as stages
from components.lib.stage.events import EVENT, reported
from components.lib.stage.run import Stage, stage
from components.lib.store.runs import failure
from components.lib.store.store import Reference, Store
from components.lib.tracking import client, runs
from components.lib.training.journal import Checkpoints, Journal

RECIPE = """
method: trsp
target: {ratio: RATIO}
calibration: {data: {path: "TEXT"}, samples: 4, length: 16}
evaluate: {perplexity: {test: {path: "TEXT"}}}
"""
TEXT = f"s3://bucket/texts/wikitext@sha256:{'a' * 64}"

Opened = Callable[..., Stage]


def recipe(ratio: float = 0.5, text: str = TEXT) -> str:
    return RECIPE.replace("RATIO", str(ratio)).replace("TEXT", text)


def reference(letter: str, bucket: str = "bucket") -> str:
    return f"s3://{bucket}/releases/{letter}@sha256:{letter * 64}"


def events(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(EVENT)) for line in printed.splitlines() if line.startswith(EVENT)]


class TestTheKey:
    """Named by what it is made of. Nothing here needs more than an empty store."""

    @pytest.fixture
    def key(self, store: Store) -> Callable[..., str]:
        def key(
            name: str = "prune",
            recipe: str = recipe(),
            sections: tuple[str, ...] = ("target", "calibration"),
            inputs: Mapping[str, str] = {"model": reference("b")},
            variant: str = "",
        ) -> str:
            with stage(name, run="one", recipe=recipe, sections=sections, inputs=inputs, variant=variant) as this:
                return this.key

        return key

    def test_is_the_same_for_the_same(self, key: Callable[..., str]) -> None:
        assert key() == key()
        assert len(key()) == 64

    @pytest.mark.parametrize(
        "changed",
        [
            {"name": "evaluate"},
            {"variant": "dense-trained"},
            {"recipe": recipe(ratio=0.25)},
            {"recipe": recipe(text=TEXT.replace("a" * 64, "b" * 64))},
            {"inputs": {"model": reference("c")}},
            {"inputs": {"release": reference("b")}},
            {"inputs": {}},
            {"sections": ("calibration",)},
        ],
    )
    def test_changes_with(self, changed: dict[str, Any], key: Callable[..., str]) -> None:
        assert key(**changed) != key()

    @pytest.mark.parametrize(
        "changed",
        [
            {"recipe": recipe(text=TEXT.replace("bucket/texts/wikitext", "other/elsewhere"))},
            {"inputs": {"model": reference("b", bucket="other")}},
            {"inputs": {"model": reference("b"), "champion": ""}},
            {"sections": ("target",), "recipe": recipe(text="s3://bucket/texts/a@sha256:" + "f" * 64)},
        ],
    )
    def test_does_not_change_with_where_things_lie_nor_with_what_the_stage_does_not_read(
        self, changed: dict[str, Any], key: Callable[..., str]
    ) -> None:
        alike = {name: changed[name] for name in ("sections",) if name in changed}
        assert key(**changed) == key(**alike)

    def test_changes_with_the_code(self, key: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        before = key()
        monkeypatch.setattr(stages, "code_version", lambda name: "other code")
        assert key() != before


def test_the_code_version_is_of_the_stages_own_folder_and_what_all_stand_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("stage.py", "transformer/gates.py", "prune/prune.py", "prune/card.md.j2", "evaluate/evaluate.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    monkeypatch.setattr(stages, "__file__", str(tmp_path / "stage.py"))
    versions = [stages.code_version("prune")]
    for file in ("stage.py", "transformer/gates.py", "prune/prune.py", "prune/card.md.j2"):
        (tmp_path / file).write_text("changed")
        versions.append(stages.code_version("prune"))
    assert len(set(versions)) == 5
    (tmp_path / "evaluate/evaluate.py").write_text("changed")
    assert stages.code_version("prune") == versions[-1]


@pytest.fixture
def model(environment: dict[str, str], folder: Path) -> str:
    """A reference to a small artifact."""
    return str(Store.from_environment().put_content(folder, "releases"))


def opened(inputs: Mapping[str, str], variant: str = "") -> Any:
    return stage("prune", run="one", recipe=recipe(), sections=["target"], inputs=inputs, variant=variant)


def copy_notes(model: Path, target: Target, out: Path, journal: Journal) -> None:
    """A stage's work."""
    (out / "model").mkdir()
    (out / "model/notes.json").write_text((model / "notes.json").read_text())
    (out / "ratio.json").write_text(str(target.ratio))
    journal.metrics({"loss": 1.0}, 1)
    journal.progress(1, 1)


class TestPerforming:
    def test_hands_the_work_its_inputs_and_sections_and_keeps_what_it_leaves(
        self, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs.open_parent("one", {}, {})
        with opened({"model": model}) as this:
            assert this.pending
            this.perform(copy_notes)
            assert not this.pending
            made = Reference.parse(this.reference)

        store = Store.from_environment()
        left = store.get(made, tmp_path / "left")
        assert (left / "model/notes.json").read_text() == "{}"
        assert (left / "ratio.json").read_text() == "0.5"
        assert json.loads((left / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}

        metadata = store.manifest(made).metadata
        assert made.uri.endswith(f"/stages/prune/{this.key}")
        assert (metadata["stage"], metadata["key"], metadata["code"]) == ("prune", this.key, this.code)
        assert metadata["inputs"] == {"model": model}
        assert metadata["settings"] == {"target": {"ratio": 0.5}}

        run = client.client().get_run(metadata["mlflow_run_id"])
        assert run.data.tags["espalier.output"] == str(made)
        assert run.data.metrics["loss"] == 1.0
        assert run.info.status == "FINISHED"

        told = events(capsys.readouterr().out)
        assert [event["event"] for event in told] == ["opened", "started", "progress", "done"]
        assert {event["stage"] for event in told} == {"prune"}

    def test_a_second_time_does_no_work(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        with opened({"model": model}) as first:
            first.perform(copy_notes)
        before = len(client.client().search_runs([client.experiment_id()]))
        capsys.readouterr()
        with opened({"model": model}) as again:
            assert not again.pending
            assert again.reference == first.reference
        assert [event["event"] for event in events(capsys.readouterr().out)] == ["opened", "reused"]
        assert len(client.client().search_runs([client.experiment_id()])) == before

    def test_that_fails_leaves_nothing_that_counts_and_says_why(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("ESPALIER_SCRATCH", str(tmp_path))

        def breaks(model: Path, target: Target, out: Path, journal: Journal) -> None:
            (out / "half").write_text("of a file")
            raise KeyError("layer")

        def perform() -> None:
            with opened({"model": model}) as this:
                this.perform(breaks)

        with pytest.raises(KeyError):
            perform()
        with opened({"model": model}) as again:
            assert again.pending
        assert list(tmp_path.iterdir()) == [tmp_path / "artifact"]
        (run,) = client.client().search_runs([client.experiment_id()])
        assert run.info.status == "FAILED"
        assert events(capsys.readouterr().out)[2] == {
            "stage": "prune",
            "event": "failed",
            "message": "KeyError: 'layer'",
        }
        left = failure("one", Store.from_environment())
        assert left is not None
        assert (left.stage, left.reason, left.lasting) == ("prune", "KeyError: 'layer'", False)

    def test_whose_end_mlflow_does_not_take_is_still_done(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def breaks(*_: Any, **__: Any) -> None:
            raise ConnectionError

        with opened({"model": model}) as this, monkeypatch.context() as patch:
            for call in ("set_terminated", "log_artifact", "set_tag"):
                patch.setattr(f"mlflow.MlflowClient.{call}", breaks)
            this.perform(copy_notes)
            assert not this.pending

    def test_without_an_output_has_no_reference(self, model: str) -> None:
        with opened({"model": model}) as this, pytest.raises(RuntimeError, match="has made no output"):
            _ = this.reference


class TestATrainingThatIsKilled:
    """Three steps, a checkpoint after each; the first attempt ends in the third."""

    class Killed(BaseException):
        pass

    @staticmethod
    def train(
        target: Target, out: Path, journal: Journal, checkpoints: Checkpoints, attempts: list[int], last: int
    ) -> None:
        state = out.parent / "state"
        done = checkpoints.latest(state) or 0
        assert done == 0 or (state / "weights").read_text() == str(done)
        assert not (state / "metrics.jsonl").exists()
        attempts.append(done)
        for step in range(done + 1, 4):
            journal.metrics({"loss": 1 / step}, step)
            if step > last:
                raise TestATrainingThatIsKilled.Killed
            kept = out.parent / f"kept-{step}"
            kept.mkdir()
            (kept / "weights").write_text(str(step))
            checkpoints.save(kept, step)
        (out / "weights").write_text("3")

    def test_goes_on_from_its_last_checkpoint_with_its_curves_whole(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        attempts: list[int] = []

        def attempt(last: int) -> Stage:
            with opened({}) as this:
                this.perform(self.train, resumes=True, attempts=attempts, last=last)
            return this

        with pytest.raises(self.Killed):
            attempt(last=2)
        store = Store.from_environment()
        assert store.folders("checkpoints") != []
        this = attempt(last=3)
        assert attempts == [0, 2]

        left = store.get(Reference.parse(this.reference), tmp_path / "left")
        lines = [json.loads(line) for line in (left / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert store.folders("checkpoints") == []

    def test_keeps_the_checkpoints_of_its_several_trainings_apart(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        for file in ("first/weights", "second/weights"):
            (tmp_path / file).parent.mkdir()
            (tmp_path / file).write_text(file)
        checkpoints = stages.StageCheckpoints(Store.from_environment(), "checkpoints/key", tmp_path)
        checkpoints.within("regularize").save(tmp_path / "first", 7)
        assert checkpoints.within("recover").latest(tmp_path / "none") is None
        checkpoints.within("recover").save(tmp_path / "second", 3)
        assert checkpoints.within("regularize").latest(tmp_path / "back") == 7
        assert (tmp_path / "back/weights").read_text() == "first/weights"


class TestAStageThatTheRecipeAsksNothingOf:
    def test_hands_its_input_on(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        with opened({"model": model}) as this:
            this.hand_on("model")
            assert not this.pending
            assert this.reference == model
        assert [event["event"] for event in events(capsys.readouterr().out)] == ["opened", "skipped"]

    def test_may_hand_on_nothing(self, model: str) -> None:
        with opened({"model": model}) as this:
            this.hand_on("")
            assert not this.pending
            assert this.reference == ""


class TestShowing:
    @pytest.fixture
    def artifact(self, tmp_path: Path) -> Any:
        return SimpleNamespace(path=str(tmp_path / "kfp/checkpoint"), metadata={})

    def test_gives_kubeflow_the_manifest_and_no_file(self, model: str, artifact: Any) -> None:
        with opened({"model": model}) as this:
            this.hand_on("model")
            this.show(artifact)
        shown = json.loads(Path(artifact.path).read_text())
        assert {file["name"] for file in shown["files"]} == {"model/weights", "notes.json"}
        assert artifact.metadata == {"reference": model, "bytes": 1026}

    def test_shows_nothing_where_nothing_is_handed_on(self, model: str, artifact: Any) -> None:
        with opened({"model": model}) as this:
            this.hand_on("")
            this.show(artifact)
        assert artifact.metadata == {}


class TestReporting:
    def test_tells_that_the_block_began_and_how_long_it_took(self, capsys: pytest.CaptureFixture[str]) -> None:
        with reported("watch"):
            pass
        opened, done = events(capsys.readouterr().out)
        assert opened == {"stage": "watch", "event": "opened"}
        assert (done["event"], done["seconds"] >= 0) == ("done", True)

    def test_tells_one_end_with_what_the_block_adds_to_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        with reported("register") as reporting:
            reporting.finish(verdict="pass")
            reporting.finish("skipped")
        _, done = events(capsys.readouterr().out)
        assert (done["event"], done["verdict"], "seconds" in done) == ("done", "pass", True)

    def test_tells_a_refusal_in_its_own_words_and_keeps_it(
        self, store: Store, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(Refusal), reported("pin", "one"):
            raise Refusal("the model is gone: name another")
        assert events(capsys.readouterr().out)[1:] == [
            {"stage": "pin", "event": "refused", "message": "the model is gone: name another"}
        ]
        left = failure("one", store)
        assert left is not None
        assert left.lasting

    def test_names_the_variant_with_the_stage(self, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        with opened({}, variant="dense-trained"):
            pass
        assert {event["stage"] for event in events(capsys.readouterr().out)} == {"prune dense-trained"}

    def test_a_store_that_is_away_hides_no_error(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("ESPALIER_BUCKET", raising=False)
        with pytest.raises(ZeroDivisionError), reported("pin", "one"):
            raise ZeroDivisionError
        assert events(capsys.readouterr().out)[1]["event"] == "failed"

    def test_an_input_that_is_no_reference_is_refused(self, store: Store) -> None:
        with pytest.raises(Refusal, match="'/tmp/model' is no reference"), opened({"model": "/tmp/model"}):
            pass
