"""How every stage runs: named by what it is made of, made once, whole or not at all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.stage import declaration
from components.lib.stage.code import Code
from components.lib.stage.declaration import Job, Stage, reads
from components.lib.stage.events import EVENT
from components.lib.stage.run import Opened, StageCheckpoints
from components.lib.store.artifacts import Reference
from components.lib.store.runs import failure
from components.lib.store.store import Store
from components.lib.tracking import client as tracking
from components.lib.tracking import runs
from components.lib.training import ranks

RECIPE = """
methods: {trsp: {ratio: RATIO}}
calibration: {data: {path: "TEXT"}, samples: 4, length: 16}
evaluate: {perplexity: {test: {path: "TEXT"}}, controls: []}
"""
TEXT = f"s3://bucket/texts/wikitext@sha256:{'a' * 64}"


@dataclass(frozen=True)
class Inputs:
    """The inputs of the stage that these tests run."""

    model: Path | None = reads("notes.json")
    others: Mapping[str, Path] = reads()


def copy_notes(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """A stage's work."""
    assert inputs.model
    (job.out / "model").mkdir()
    (job.out / "model/notes.json").write_text((inputs.model / "notes.json").read_text())
    (job.out / "files.json").write_text(json.dumps(sorted(path.name for path in inputs.model.rglob("*"))))
    (job.out / "samples.json").write_text(str(recipe.calibration.samples))
    job.journal.metrics({"loss": 1.0}, 1)
    job.journal.progress(1, 1)


STAGE = Stage("prune", Inputs, copy_notes, sections=("methods", "calibration"))


def recipe(ratio: float = 0.5, text: str = TEXT) -> str:
    return RECIPE.replace("RATIO", str(ratio)).replace("TEXT", text)


def events(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(EVENT)) for line in printed.splitlines() if line.startswith(EVENT)]


@pytest.fixture
def model(environment: dict[str, str], folder: Path) -> str:
    """A reference to a small artifact: `notes.json` and `model/weights`."""
    return str(Store.from_environment().put_content(folder, "releases"))


def put(folder: Path, **files: str) -> str:
    """Store an artifact of some files, and return its reference."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return str(Store.from_environment().put_content(folder, "releases"))


class TestTheKey:
    """Named by what it is made of."""

    @pytest.fixture
    def key(self, model: str) -> Callable[..., str]:
        def key(stage: Stage[Inputs] = STAGE, recipe: str = recipe(), variant: str = "", **references: Any) -> str:
            given = {"model": model} | references
            return Opened(stage, "one", parse_recipe(recipe), variant, given, Store.from_environment()).key

        return key

    def test_is_the_same_for_the_same(self, key: Callable[..., str]) -> None:
        assert key() == key()
        assert len(key()) == 64

    @pytest.mark.parametrize(
        "changed",
        [
            {"stage": replace(STAGE, name="evaluate")},
            {"stage": replace(STAGE, sections=("calibration",))},
            {"stage": replace(STAGE, without=("calibration.samples",))},
            {"stage": replace(STAGE, salt=1)},
            {"variant": "dense-trained"},
            {"recipe": recipe(ratio=0.25)},
            {"recipe": recipe(text=TEXT.replace("a" * 64, "b" * 64))},
            {"model": ""},
        ],
    )
    def test_changes_with(self, changed: dict[str, Any], key: Callable[..., str]) -> None:
        assert key(**changed) != key()

    def test_changes_with_a_file_that_is_read_and_with_no_other(self, key: Callable[..., str], tmp_path: Path) -> None:
        same = put(tmp_path / "same", notes__json="{}", weights="other")
        other = put(tmp_path / "other", notes__json="[]")
        assert key(model=same) == key()
        assert key(model=other) != key()

    def test_changes_with_each_input_of_a_mapping_and_its_name(self, key: Callable[..., str], tmp_path: Path) -> None:
        one, other = put(tmp_path / "one", a="1"), put(tmp_path / "other", a="2")
        keys = [key(), key(others={"x": one}), key(others={"x": other}), key(others={"y": one}), key(others={"x": ""})]
        assert len(set(keys)) == 4
        assert keys[4] == keys[0]

    @pytest.mark.parametrize(
        "changed",
        [
            {"recipe": recipe(text=TEXT.replace("bucket/texts/wikitext", "other/elsewhere"))},
            {"recipe": recipe() + "recover: {steps: 3}\n"},
        ],
    )
    def test_does_not_change_with_where_things_lie_nor_with_settings_that_are_not_read(
        self, changed: dict[str, Any], key: Callable[..., str]
    ) -> None:
        assert key(**changed) == key()

    @pytest.mark.parametrize("other", [Code({"a": "1"}, {}), Code({}, {"torch": "9.9"})])
    def test_changes_with_the_code_and_the_libraries(
        self, other: Code, key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = key()
        monkeypatch.setattr(declaration, "code_of", lambda *_: other)
        assert key() != before

    def test_of_an_input_that_is_not_declared_is_a_mistake(self, key: Callable[..., str]) -> None:
        with pytest.raises(TypeError, match="the stage prune has no input release"):
            key(release="")

    def test_of_an_input_that_is_no_reference_is_refused(self, key: Callable[..., str]) -> None:
        with pytest.raises(Refusal, match="'/tmp/model' is no reference"):
            key(model="/tmp/model")


def run(model: str, stage: Stage[Inputs] = STAGE, **more: Any) -> str:
    return stage.run("one", recipe(), model=model, **more)


class TestRunning:
    def test_gives_the_work_its_inputs_and_sections_and_keeps_what_it_leaves(
        self, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs.open_parent("one", {}, {})
        made = Reference.parse(run(model))

        store = Store.from_environment()
        left = store.get(made, tmp_path / "left")
        assert (left / "model/notes.json").read_text() == "{}"
        assert (left / "samples.json").read_text() == "4"
        assert json.loads((left / "files.json").read_text()) == ["notes.json"]
        assert json.loads((left / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}

        metadata = store.manifest(made).metadata
        assert made.uri.endswith(f"/stages/prune/{metadata['key']}")
        assert (metadata["stage"], metadata["made_of"]["stage"]) == ("prune", "prune")
        assert metadata["inputs"] == {"model": model}
        assert metadata["settings"]["calibration"]["samples"] == 4
        assert metadata["seconds"] >= 0

        found = tracking.client().get_run(metadata["mlflow_run_id"])
        assert found.data.tags["espalier.output"] == str(made)
        assert found.data.tags["sha256.key"] == metadata["key"]
        assert found.data.metrics["loss"] == 1.0
        assert found.info.status == "FINISHED"

        told = events(capsys.readouterr().out)
        assert [event["event"] for event in told] == ["opened", "started", "progress", "done"]
        assert {event["stage"] for event in told} == {"prune"}

    def test_a_second_time_does_no_work(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        first = run(model)
        count = len(tracking.client().search_runs([tracking.experiment_id()]))
        capsys.readouterr()
        assert run(model) == first
        assert [event["event"] for event in events(capsys.readouterr().out)] == ["opened", "reused"]
        assert len(tracking.client().search_runs([tracking.experiment_id()])) == count

    def test_that_fails_leaves_nothing_that_counts_and_says_why(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("ESPALIER_SCRATCH", str(tmp_path))

        def breaks(inputs: Inputs, recipe: Recipe, job: Job) -> None:
            (job.out / "half").write_text("of a file")
            raise KeyError("layer")

        stage = replace(STAGE, work=breaks)
        with pytest.raises(KeyError):
            run(model, stage)
        store = Store.from_environment()
        assert Opened(stage, "one", parse_recipe(recipe()), "", {"model": model}, store).found is None
        assert list(tmp_path.iterdir()) == [tmp_path / "artifact"]
        (found,) = tracking.client().search_runs([tracking.experiment_id()])
        assert found.info.status == "FAILED"
        assert events(capsys.readouterr().out)[-1] == {
            "stage": "prune",
            "event": "failed",
            "message": "KeyError: 'layer'",
        }
        left = failure("one", store)
        assert left is not None
        assert (left.stage, left.reason, left.lasting) == ("prune", "KeyError: 'layer'", False)

    def test_whose_end_mlflow_does_not_take_is_still_done(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def breaks(*_: Any, **__: Any) -> None:
            raise ConnectionError

        with monkeypatch.context() as patch:
            for call in ("set_terminated", "log_artifact", "set_tag"):
                patch.setattr(f"mlflow.MlflowClient.{call}", breaks)
            assert run(model)

    def test_of_a_section_that_is_not_declared_fails(self, model: str) -> None:
        def reads_more(inputs: Inputs, recipe: Recipe, job: Job) -> None:
            (job.out / "steps").write_text(str(recipe.recover.steps))

        with pytest.raises(AttributeError, match="recover"):
            run(model, replace(STAGE, work=reads_more))

    def test_names_the_variant_with_the_stage(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        run(model, variant="dense-trained")
        assert {event["stage"] for event in events(capsys.readouterr().out)} == {"prune dense-trained"}

    def test_gives_several_inputs_under_one_name(self, model: str, tmp_path: Path) -> None:
        def lists(inputs: Inputs, recipe: Recipe, job: Job) -> None:
            found = {name: (path / "a").read_text() for name, path in inputs.others.items()}
            (job.out / "found.json").write_text(json.dumps([found, dict(job.digests)]))

        one, other = put(tmp_path / "one", a="1"), put(tmp_path / "other", a="2")
        made = run(model, replace(STAGE, work=lists), others={"one": one, "other": other, "none": ""})
        left = Store.from_environment().get(Reference.parse(made), tmp_path / "left")
        found, digests = json.loads((left / "found.json").read_text())
        assert found == {"one": "1", "other": "2"}
        assert digests["others"] == {"one": one[-64:], "other": other[-64:]}


@dataclass(frozen=True)
class Parts:
    """An input of which one file is fetched when the work comes to it."""

    model: Path = reads("notes.json", later=("part-*",))


class TestFilesThatAreFetchedLater:
    """An input that is larger than the disk, and an output."""

    @pytest.fixture
    def parts(self, environment: dict[str, str], tmp_path: Path) -> str:
        return put(tmp_path / "parts", notes__json="{}", **{"part-0": "zero", "part-1": "one"})

    def test_are_fetched_by_the_work_one_by_one_and_deleted(self, parts: str, tmp_path: Path) -> None:
        paths = list[Path]()

        def work(inputs: Parts, recipe: Recipe, job: Job) -> None:
            assert [path.name for path in inputs.model.iterdir()] == ["notes.json"]
            fetch = pickle.loads(pickle.dumps(job.fetch("model")))  # as a process of its own is given it
            with fetch("part-1") as path:
                paths.append(path)
                (job.out / "copy").write_text(path.read_text())

        made = Stage("prune", Parts, work).run("one", recipe(), model=parts)
        assert (Store.from_environment().get(Reference.parse(made), tmp_path / "left") / "copy").read_text() == "one"
        assert not paths[0].exists()

    def test_change_the_key(self, parts: str, tmp_path: Path) -> None:
        def key(model: str) -> str:
            stage = Stage("prune", Parts, copy_notes)  # type: ignore[arg-type]
            return Opened(stage, "one", parse_recipe(recipe()), "", {"model": model}, Store.from_environment()).key

        other = put(tmp_path / "other", notes__json="{}", **{"part-0": "zero", "part-1": "two"})
        assert key(parts) != key(other)

    def test_files_that_the_work_sends_belong_to_the_output_and_leave_the_disk(
        self, parts: str, tmp_path: Path
    ) -> None:
        def work(inputs: Parts, recipe: Recipe, job: Job) -> None:
            for number in range(2):
                (job.out / f"made-{number}").write_text(str(number))
                job.send(job.out / f"made-{number}")
                assert not (job.out / f"made-{number}").exists()
            (job.out / "index").write_text("2")

        made = Stage("prune", Parts, work).run("one", recipe(), model=parts)
        left = Store.from_environment().get(Reference.parse(made), tmp_path / "left")
        assert {name: (left / name).read_text() for name in ("made-0", "made-1", "index")} == {
            "made-0": "0",
            "made-1": "1",
            "index": "2",
        }


def share_notes(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """A work that several processes share: the first one leaves how many there are."""
    counted = ranks.summed(torch.ones(()))
    job.journal.metrics({"loss": counted.item()}, 1)
    if ranks.first():
        (job.out / "processes").write_text(str(int(counted)))
        assert job.checkpoints.latest(job.out.parent / "state") is None


def refuse(inputs: Inputs, recipe: Recipe, job: Job) -> None:
    """A work that cannot be done with this recipe."""
    raise Refusal("lower it")


class TestSeveralProcesses:
    """One stage, whatever the number of processes: one journal, one output, one error."""

    @pytest.fixture(autouse=True)
    def two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ESPALIER_PROCESSES", "2")

    def test_share_the_work_of_a_stage_that_allows_it(self, model: str, tmp_path: Path) -> None:
        shared = replace(STAGE, work=share_notes, shared=True)
        left = Store.from_environment().get(Reference.parse(run(model, shared)), tmp_path / "left")
        assert (left / "processes").read_text() == "2"
        assert json.loads((left / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}

    def test_refuse_in_the_words_of_one(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(Refusal, match=r"^lower it$"):
            run(model, replace(STAGE, work=refuse, shared=True))
        assert events(capsys.readouterr().out)[-1] == {"stage": "prune", "event": "refused", "message": "lower it"}

    def test_are_refused_before_anything_is_fetched_if_they_cannot_step(
        self, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ESPALIER_PARALLEL", "fsdp")
        monkeypatch.setattr(Store, "get", lambda *_: pytest.fail("fetched"))
        trains = replace(STAGE, work=share_notes, shared=True, sections=("regularize",))
        with pytest.raises(Refusal, match=r"^regularize.optimizer is adamw-8bit, and ESPALIER_PARALLEL is fsdp"):
            trains.run("one", f"{recipe()}regularize: {{optimizer: adamw-8bit}}\n", model=model)

    def test_are_not_started_for_another_stage(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ranks, "launch", lambda *_: pytest.fail("launched"))
        assert run(model)


class TestATrainingThatIsKilled:
    """Three steps, a checkpoint after each; the first attempt ends in the third."""

    class Killed(BaseException):
        pass

    @staticmethod
    def train(job: Job, attempts: list[int], last: int) -> None:
        out, journal, checkpoints = job.out, job.journal, job.checkpoints
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

        def attempt(last: int) -> str:
            def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
                self.train(job, attempts, last)

            return run("", replace(STAGE, work=work, resumes=True))

        with pytest.raises(self.Killed):
            attempt(last=2)
        store = Store.from_environment()
        assert store.folders("checkpoints") != []
        made = attempt(last=3)
        assert attempts == [0, 2]

        left = store.get(Reference.parse(made), tmp_path / "left")
        lines = [json.loads(line) for line in (left / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert store.folders("checkpoints") == []

    def test_keeps_the_checkpoints_of_its_several_trainings_apart(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        for file in ("first/weights", "second/weights"):
            (tmp_path / file).parent.mkdir()
            (tmp_path / file).write_text(file)
        checkpoints = StageCheckpoints(Store.from_environment(), "checkpoints/key", tmp_path)
        checkpoints.scoped("regularize").save(tmp_path / "first", 7)
        assert checkpoints.scoped("recover").latest(tmp_path / "none") is None
        checkpoints.scoped("recover").save(tmp_path / "second", 3)
        assert checkpoints.scoped("regularize").latest(tmp_path / "back") == 7
        assert (tmp_path / "back/weights").read_text() == "first/weights"


class TestAStageThatTheRecipeDoesNotAskFor:
    STAGE = replace(STAGE, asked=lambda recipe, variant: False, passes="model")

    def test_passes_its_input_through(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(model, self.STAGE) == model
        assert [event["event"] for event in events(capsys.readouterr().out)] == ["opened", "skipped"]

    def test_may_pass_nothing(self, model: str) -> None:
        assert run(model, replace(self.STAGE, passes="")) == ""


class TestShowing:
    @pytest.fixture
    def artifact(self, tmp_path: Path) -> Any:
        return SimpleNamespace(path=str(tmp_path / "kfp/checkpoint"), metadata={})

    def test_gives_kubeflow_the_manifest_and_no_file(self, model: str, artifact: Any) -> None:
        run(model, TestAStageThatTheRecipeDoesNotAskFor.STAGE, show=artifact)
        shown = json.loads(Path(artifact.path).read_text())
        assert {file["name"] for file in shown["files"]} == {"model/weights", "notes.json"}
        assert artifact.metadata == {"reference": model, "bytes": 1026}

    def test_shows_nothing_if_there_is_no_output(self, model: str, artifact: Any) -> None:
        run(model, replace(TestAStageThatTheRecipeDoesNotAskFor.STAGE, passes=""), show=artifact)
        assert artifact.metadata == {}
