"""What a recompression leaves in MLflow, on a real server: a parent run, and a run for each stage."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from components.lib.errors import Refusal
from components.lib.tracking import client, origin, runs, trail
from tests.components.lib.tracking.given import AWAY, a_run, reference


def all_runs(mlflow: MlflowClient) -> list[Run]:
    return list(mlflow.search_runs([client.experiment_id()]))


@pytest.mark.parametrize("failures", [1, runs.ATTEMPTS])
def test_data_that_another_run_logs_at_the_same_time_is_logged_again(
    mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """MLflow then answers that the data set is there already, as it does to the second of two cells that start together."""
    run, log, answers = runs.open_parent("one", {}, {}), MlflowClient.log_inputs, iter([True] * failures)

    def fails_first(self: MlflowClient, *given: Any) -> None:
        if next(answers, False):
            raise MlflowException("UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest")
        log(self, *given)

    monkeypatch.setattr(MlflowClient, "log_inputs", fails_first)
    with pytest.raises(MlflowException) if failures == runs.ATTEMPTS else nullcontext():
        runs.log_data(run, {"wikitext2": reference("d")}, "evaluate")
    logged = [one.dataset.name for one in mlflow.get_run(run).inputs.dataset_inputs]
    assert logged == (["wikitext2"] if failures < runs.ATTEMPTS else [])


class TestTheParentRun:
    def test_is_made_with_its_tags_and_the_recipe(self, mlflow: MlflowClient) -> None:
        recipe = {"method": "trsp", "target": {"ratio": 0.25}, "evaluate": {"length": None, "controls": ()}}
        run = mlflow.get_run(runs.open_parent("one", {"espalier.digest": "d"}, recipe))
        assert run.info.run_name == "one"
        assert run.data.tags["espalier.digest"] == "d"
        assert run.data.params == {"method": "trsp", "target.ratio": "0.25", "evaluate.controls": "()"}

    def test_is_made_once_for_a_label(self, mlflow: MlflowClient) -> None:
        first = runs.open_parent("one", {}, {"method": "trsp"})
        assert runs.open_parent("one", {}, {"method": "trsp"}) == first
        assert runs.open_parent("two", {}, {}) != first
        assert len(all_runs(mlflow)) == 2

    def test_names_its_source_its_commit_and_its_user(self, mlflow: MlflowClient) -> None:
        tags = mlflow.get_run(runs.open_parent("one", {}, {})).data.tags
        assert tags["mlflow.source.name"].startswith("espalier")
        assert tags["mlflow.user"] == trail.user()
        assert tags.get("mlflow.source.git.commit", "") == origin.commit()

    def test_has_its_data_sets_as_inputs_once_with_their_digests(self, mlflow: MlflowClient) -> None:
        run = runs.open_parent("one", {}, {})
        for _ in range(2):
            runs.log_data(run, {"wikitext2": reference("d")}, "evaluate")
        (found,) = mlflow.get_run(run).inputs.dataset_inputs
        assert (found.dataset.name, found.dataset.digest) == ("wikitext2", "d" * 32)
        assert json.loads(found.dataset.source) == {"uri": reference("d").uri}
        assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "evaluate")]

    def test_that_nobody_opened_is_not_found(self, mlflow: MlflowClient) -> None:
        runs.open_parent("one", {}, {})
        assert runs.find_parent("two") is None

    def test_takes_a_recipe_of_more_params_than_one_call_to_mlflow(self, mlflow: MlflowClient) -> None:
        recipe = {"section": {f"field{number}": number for number in range(230)}, "long": "x" * 10_000}
        params = mlflow.get_run(runs.open_parent("one", {}, recipe)).data.params
        assert len(params) == 231
        assert params["section.field229"] == "229"
        assert params["long"] == "x" * 6000

    @pytest.mark.parametrize(("succeeded", "state"), [(True, "FINISHED"), (False, "FAILED")])
    def test_ends_in_the_state_of_the_run(self, succeeded: bool, state: str, mlflow: MlflowClient) -> None:
        run = runs.open_parent("one", {}, {})
        runs.close_parent("one", succeeded)
        assert mlflow.get_run(run).info.status == state

    def test_ends_the_runs_of_stages_that_were_killed_and_no_others(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        runs.open_parent("one", {}, {})
        runs.open_parent("two", {}, {})
        with a_run("one", tmp_path, key="1") as finished:
            pass
        # As long as these two are held, nothing ends them: so it is with a stage that is killed.
        opened = [a_run(run, tmp_path) for run in ("one", "two")]
        killed, of_another = [stage_run.__enter__() for stage_run in opened]
        runs.close_parent("one", succeeded=False)
        states = {run.info.run_id: run.info.status for run in all_runs(mlflow)}
        assert states[finished.run_id] == "FINISHED"
        assert states[killed.run_id] == "FAILED"
        assert states[of_another.run_id] == "RUNNING"

    def test_that_was_never_opened_is_closed_without_a_word(self, mlflow: MlflowClient) -> None:
        runs.close_parent("one", succeeded=False)
        assert all_runs(mlflow) == []

    def test_keeps_the_report_and_its_numbers(self, mlflow: MlflowClient) -> None:
        run = runs.open_parent("one", {}, {})
        runs.leave_report("one", {"report.json": "{}"}, {"perplexity.test": 12.5}, "**Pass**")
        assert mlflow.get_run(run).data.tags["mlflow.note.content"] == "**Pass**"
        assert [file.path for file in mlflow.list_artifacts(run)] == ["report.json"]
        assert mlflow.get_run(run).data.metrics == {"perplexity.test": 12.5}


class TestAStagesRun:
    def test_is_nested_and_names_all_that_its_output_is_made_of(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        parent = runs.open_parent("one", {}, {})
        with a_run("one", tmp_path, variant="dense-trained", regularize={"steps": 3}) as journal:
            pass
        run = mlflow.get_run(journal.run_id)
        assert run.info.run_name == "prune dense-trained"
        assert run.info.status == "FINISHED"
        assert run.data.params == {"regularize.steps": "3"}
        tags = {
            name: value
            for name, value in run.data.tags.items()
            if name.startswith(("espalier", "sha256", "mlflow.parent"))
        }
        assert tags == {
            "mlflow.parentRunId": parent,
            "espalier.stage_of": "one",
            "espalier.stage": "prune",
            "espalier.variant": "dense-trained",
            "sha256.key": "a" * 64,
            "sha256.code": "c" * 64,
            "espalier.input.model": str(reference("b")),
        }

    def test_fails_with_the_stage(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        with suppress(ZeroDivisionError), a_run("one", tmp_path):
            raise ZeroDivisionError
        assert [run.info.status for run in all_runs(mlflow)] == ["FAILED"]

    def test_that_cannot_be_ended_hides_neither_the_output_nor_the_error(
        self, mlflow: MlflowClient, tmp_path: Path, away: pytest.MonkeyPatch
    ) -> None:
        with a_run("one", tmp_path):
            away.setenv(*AWAY)
        away.undo()
        with pytest.raises(Refusal, match="not finite"), a_run("two", tmp_path):
            raise self.refused_while(away)

    @staticmethod
    def refused_while(away: pytest.MonkeyPatch) -> Refusal:
        away.setenv(*AWAY)
        return Refusal("the loss is not finite")

    def test_keeps_the_small_files_of_the_output_and_where_it_lies(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        for file in ("selection.json", "gates.svg", "weights.safetensors"):
            (tmp_path / file).write_text("{}")
        with a_run("one", tmp_path) as journal:
            journal.leave(tmp_path, str(reference("d")), 1.5)
        run = mlflow.get_run(journal.run_id)
        assert run.data.tags["espalier.output"] == str(reference("d"))
        assert run.data.metrics["seconds"] == 1.5
        assert sorted(file.path for file in mlflow.list_artifacts(journal.run_id)) == ["gates.svg", "selection.json"]


def test_a_reused_output_is_a_run_that_points_at_the_one_that_made_it(mlflow: MlflowClient, tmp_path: Path) -> None:
    parent = runs.open_parent("again", {}, {})
    with a_run("again", tmp_path, key="own"):
        pass
    made = {"stage": "prune", "code": "c", "mlflow_run_id": "first"}
    manifests = {"calibrate": {**made, "key": "earlier"}, "prune": {**made, "key": "own"}}
    for _ in range(2):
        runs.record_reused("again", manifests)
    (reused,) = [run for run in all_runs(mlflow) if "espalier.reused_from" in run.data.tags]
    assert reused.info.run_name == "calibrate (reused)"
    assert reused.info.status == "FINISHED"
    assert reused.data.tags["espalier.reused_from"] == "first"
    assert reused.data.tags["mlflow.parentRunId"] == parent
