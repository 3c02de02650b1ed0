"""What a recompression leaves in MLflow, on a real server."""

from __future__ import annotations

import http.server
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from components.lib.errors import Refusal, Unavailable
from components.lib.store.store import Reference
from components.lib.tracking import tracking

NOWHERE = "http://127.0.0.1:9"
"""An address where nothing answers."""


@pytest.fixture
def mlflow(environment: dict[str, str]) -> MlflowClient:
    """MLflow, with an experiment of this test's own."""
    return MlflowClient()


@pytest.fixture
def name() -> str:
    """A registered model's name that no other test uses: the registry is shared."""
    return f"model-{uuid.uuid4().hex}"


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Sends MLflow away by `away.setenv(*AWAY)`, and back by `away.undo()`; nothing is asked twice meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield patch


AWAY = ("MLFLOW_TRACKING_URI", NOWHERE)


def a_stage(run: str, key: str = "a" * 64, variant: str = "", told: list[Any] | None = None, **settings: Any) -> Any:
    def tell(event: str, **details: Any) -> None:
        if told is not None:
            told.append((event, details))

    return SimpleNamespace(
        name="prune",
        variant=variant,
        run=run,
        key=key,
        code="c" * 64,
        inputs={"model": reference("b")},
        settings=settings,
        tell=tell,
    )


def reference(letter: str, bucket: str = "bucket") -> Reference:
    return Reference(f"s3://{bucket}/stages/prune/{letter}", letter * 64)


def runs(mlflow: MlflowClient) -> list[Run]:
    return list(mlflow.search_runs([tracking.experiment_id()]))


class TestTheServer:
    def test_is_there(self, environment: dict[str, str]) -> None:
        tracking.check()

    def test_that_is_not_named_is_refused_rather_than_a_local_file_written(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(Unavailable, match="MLFLOW_TRACKING_URI is not set: start the embedded services"):
            tracking.check()

    def test_that_does_not_answer_is_refused_with_its_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(*AWAY)
        with pytest.raises(
            Unavailable, match=rf"^MLflow at {NOWHERE} does not answer \(.*refused.*\): start it, or correct"
        ):
            tracking.check()

    @pytest.mark.parametrize("status", [401, 403])
    def test_that_turns_this_client_away_is_refused_with_what_to_set(
        self, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class TurnsAway(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_error(status)

            def log_message(self, *_: Any) -> None:
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), TurnsAway) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
            with pytest.raises(Unavailable, match=rf"refuses this client \({status}\): set MLFLOW_TRACKING_TOKEN"):
                tracking.check()
            server.shutdown()


class TestTheParentRun:
    def test_is_made_with_its_tags_and_the_recipe(self, mlflow: MlflowClient) -> None:
        recipe = {"method": "trsp", "target": {"ratio": 0.25}, "evaluate": {"length": None, "controls": ()}}
        run = mlflow.get_run(tracking.open_parent("one", {"espalier.digest": "d"}, recipe))
        assert run.info.run_name == "one"
        assert run.data.tags["espalier.digest"] == "d"
        assert run.data.params == {"method": "trsp", "target.ratio": "0.25", "evaluate.controls": "()"}

    def test_is_made_once_for_a_label(self, mlflow: MlflowClient) -> None:
        first = tracking.open_parent("one", {}, {"method": "trsp"})
        assert tracking.open_parent("one", {}, {"method": "trsp"}) == first
        assert tracking.open_parent("two", {}, {}) != first
        assert len(runs(mlflow)) == 2

    def test_that_nobody_opened_is_not_found(self, mlflow: MlflowClient) -> None:
        tracking.open_parent("one", {}, {})
        assert tracking.find_parent("two") is None

    def test_takes_a_recipe_of_more_params_than_one_call_to_mlflow(self, mlflow: MlflowClient) -> None:
        recipe = {"section": {f"field{number}": number for number in range(230)}, "long": "x" * 10_000}
        params = mlflow.get_run(tracking.open_parent("one", {}, recipe)).data.params
        assert len(params) == 231
        assert params["section.field229"] == "229"
        assert params["long"] == "x" * 6000

    @pytest.mark.parametrize(("succeeded", "state"), [(True, "FINISHED"), (False, "FAILED")])
    def test_ends_in_the_state_of_the_run(self, succeeded: bool, state: str, mlflow: MlflowClient) -> None:
        run = tracking.open_parent("one", {}, {})
        tracking.close_parent("one", succeeded)
        assert mlflow.get_run(run).info.status == state

    def test_ends_the_runs_of_stages_that_were_killed_and_no_others(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        tracking.open_parent("one", {}, {})
        tracking.open_parent("two", {}, {})
        with tracking.stage_run(a_stage("one", key="1"), tmp_path) as finished:
            pass
        # As long as these two are held, nothing ends them: so it is with a stage that is killed.
        opened = [tracking.stage_run(a_stage(run), tmp_path) for run in ("one", "two")]
        killed, of_another = [stage_run.__enter__() for stage_run in opened]
        tracking.close_parent("one", succeeded=False)
        states = {run.info.run_id: run.info.status for run in runs(mlflow)}
        assert states[finished.run_id] == "FINISHED"
        assert states[killed.run_id] == "FAILED"
        assert states[of_another.run_id] == "RUNNING"

    def test_that_was_never_opened_is_closed_without_a_word(self, mlflow: MlflowClient) -> None:
        tracking.close_parent("one", succeeded=False)
        assert runs(mlflow) == []

    def test_keeps_the_report_and_its_numbers(self, mlflow: MlflowClient) -> None:
        run = tracking.open_parent("one", {}, {})
        tracking.leave_report("one", {"report.json": "{}"}, {"perplexity.test": 12.5})
        assert [file.path for file in mlflow.list_artifacts(run)] == ["report.json"]
        assert mlflow.get_run(run).data.metrics == {"perplexity.test": 12.5}


class TestAStagesRun:
    def test_is_nested_and_names_all_that_its_output_is_made_of(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        parent = tracking.open_parent("one", {}, {})
        with tracking.stage_run(a_stage("one", variant="dense-trained", regularize={"steps": 3}), tmp_path) as journal:
            pass
        run = mlflow.get_run(journal.run_id)
        assert run.info.run_name == "prune dense-trained"
        assert run.info.status == "FINISHED"
        assert run.data.params == {"regularize.steps": "3"}
        told = {name: value for name, value in run.data.tags.items() if name.startswith(("espalier", "mlflow.parent"))}
        assert told == {
            "mlflow.parentRunId": parent,
            "espalier.stage_of": "one",
            "espalier.stage": "prune",
            "espalier.variant": "dense-trained",
            "espalier.key": "a" * 64,
            "espalier.code": "c" * 64,
            "espalier.input.model": str(reference("b")),
        }

    def test_fails_with_the_stage(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        with suppress(ZeroDivisionError), tracking.stage_run(a_stage("one"), tmp_path):
            raise ZeroDivisionError
        assert [run.info.status for run in runs(mlflow)] == ["FAILED"]

    def test_that_cannot_be_ended_hides_neither_the_output_nor_the_error(
        self, mlflow: MlflowClient, tmp_path: Path, away: pytest.MonkeyPatch
    ) -> None:
        with tracking.stage_run(a_stage("one"), tmp_path):
            away.setenv(*AWAY)
        away.undo()
        with pytest.raises(Refusal, match="not finite"), tracking.stage_run(a_stage("two"), tmp_path):
            raise self.refused_while(away)

    @staticmethod
    def refused_while(away: pytest.MonkeyPatch) -> Refusal:
        away.setenv(*AWAY)
        return Refusal("the loss is not finite")

    def test_keeps_the_small_files_of_the_output_and_where_it_lies(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        for file in ("selection.json", "gates.svg", "weights.safetensors"):
            (tmp_path / file).write_text("{}")
        with tracking.stage_run(a_stage("one"), tmp_path) as journal:
            journal.leave(tmp_path, str(reference("d")), 1.5)
        run = mlflow.get_run(journal.run_id)
        assert run.data.tags["espalier.output"] == str(reference("d"))
        assert run.data.metrics["seconds"] == 1.5
        assert sorted(file.path for file in mlflow.list_artifacts(journal.run_id)) == ["gates.svg", "selection.json"]


class TestNumbers:
    def curve(self, mlflow: MlflowClient, run_id: str, metric: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in mlflow.get_metric_history(run_id, metric)]

    def test_are_curves_in_mlflow_and_lines_of_a_file(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        with tracking.stage_run(a_stage("one"), tmp_path) as journal:
            journal.metrics({"loss": 3.0, "rate": 0.1}, 1)
            journal.metrics({"loss": 2.0}, 2)
            journal.flush()
        assert self.curve(mlflow, journal.run_id, "loss") == [(1, 3.0), (2, 2.0)]
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines == [{"step": 1, "loss": 3.0, "rate": 0.1}, {"step": 2, "loss": 2.0}]

    def test_of_more_than_one_call_to_mlflow_all_arrive(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        with tracking.stage_run(a_stage("one"), tmp_path) as journal:
            for step in range(1100):
                journal.metrics({"loss": float(step)}, step)
            journal.flush()
        assert len(self.curve(mlflow, journal.run_id, "loss")) == 1100

    def test_wait_while_mlflow_is_away_and_are_sent_when_it_is_back(
        self, mlflow: MlflowClient, tmp_path: Path, away: pytest.MonkeyPatch
    ) -> None:
        with tracking.stage_run(a_stage("one"), tmp_path) as journal:
            away.setenv(*AWAY)
            journal.metrics({"loss": 3.0}, 1)
            journal.flush()
            journal.metrics({"loss": 2.0}, 2)
            away.undo()
            journal.flush()
        assert self.curve(mlflow, journal.run_id, "loss") == [(1, 3.0), (2, 2.0)]

    def test_are_sent_ever_less_often_to_a_server_that_stays_away(
        self, mlflow: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        clock = SimpleNamespace(monotonic=lambda: float(len(lines)), time=lambda: 0.0)
        lines: list[int] = []
        with tracking.stage_run(a_stage("one"), tmp_path) as journal, monkeypatch.context() as patch:
            patch.setattr(tracking, "time", clock)
            patch.setattr(tracking, "client", lambda: asked.append(len(lines)))
            journal._flushed = 0.0
            for second in range(1, 2001):
                lines.append(second)
                journal.metrics({"loss": 1.0}, second)
        gaps = [later - earlier for earlier, later in pairwise(asked)]
        assert gaps[:3] == [11, 21, 41]
        assert max(gaps) == tracking.LONGEST_PAUSE + 1

    def test_beside_the_bar_are_told_a_few_times_a_second_and_at_the_end(
        self, mlflow: MlflowClient, tmp_path: Path
    ) -> None:
        told: list[Any] = []
        with tracking.stage_run(a_stage("one", told=told), tmp_path) as journal:
            for done in range(1, 101):
                journal.progress(done, 100, loss=1.0)
        assert len(told) < 20
        assert told[-1] == ("progress", {"done": 100, "total": 100, "shown": {"loss": 1.0}})


def test_a_reused_output_is_a_run_that_points_at_the_one_that_made_it(mlflow: MlflowClient, tmp_path: Path) -> None:
    parent = tracking.open_parent("again", {}, {})
    with tracking.stage_run(a_stage("again", key="own"), tmp_path):
        pass
    made = {"stage": "prune", "code": "c", "mlflow_run_id": "first"}
    manifests = {"calibrate": {**made, "key": "earlier"}, "prune": {**made, "key": "own"}}
    for _ in range(2):
        tracking.record_reused("again", manifests)
    (reused,) = [run for run in runs(mlflow) if "espalier.reused_from" in run.data.tags]
    assert reused.info.run_name == "calibrate (reused)"
    assert reused.info.status == "FINISHED"
    assert reused.data.tags["espalier.reused_from"] == "first"
    assert reused.data.tags["mlflow.parentRunId"] == parent


class TestAVersion:
    @pytest.fixture
    def run(self, mlflow: MlflowClient) -> str:
        return tracking.open_parent("one", {}, {})

    def test_is_the_checkpoints_prefix_with_its_evidence(self, name: str, run: str) -> None:
        version = tracking.register_version(name, reference("a"), run, {"espalier.verdict": "pass"})
        assert (version.name, version.version) == (name, "1")
        assert version.source == f"{reference('a').uri}/model"
        assert version.reference == reference("a")
        assert version.tags["espalier.verdict"] == "pass"

    def test_is_the_same_one_however_often_it_is_registered(self, name: str, run: str, mlflow: MlflowClient) -> None:
        tracking.register_version(name, reference("a"), run, {"espalier.verdict": "fail"})
        again = tracking.register_version(name, reference("a", bucket="moved"), run, {"espalier.verdict": "pass"})
        assert (again.version, again.tags["espalier.verdict"]) == ("1", "pass")
        other = tracking.register_version(name, reference("b"), run, {})
        assert other.version == "2"
        assert len(mlflow.search_model_versions(f"name = '{name}'")) == 2

    def test_that_two_made_at_once_is_the_older_one(
        self, name: str, run: str, mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tracking.register_version(name, reference("a"), run, {})
        # The other's version is seen only at the second look.
        monkeypatch.setattr(tracking, "_holding", _blind_once(tracking._holding))
        assert tracking.register_version(name, reference("a"), run, {}).version == "1"
        assert len(mlflow.search_model_versions(f"name = '{name}'")) == 1

    def test_that_is_not_there_is_refused_with_those_that_are(self, name: str, run: str) -> None:
        with pytest.raises(Refusal, match=f"no version 7 of {name}: no model is registered under that name"):
            tracking.version_of(name, "7")
        tracking.register_version(name, reference("a"), run, {})
        tracking.register_version(name, reference("b"), run, {})
        with pytest.raises(Refusal, match=f"no version 7 of {name}: it has 1, 2"):
            tracking.version_of(name, "7")

    def test_that_others_registered_has_no_reference(self, name: str, mlflow: MlflowClient) -> None:
        mlflow.create_registered_model(name)
        mlflow.create_model_version(name, "s3://bucket/model")
        with pytest.raises(Refusal, match=r"has no tag espalier\.reference: it was not registered by espalier"):
            _ = tracking.version_of(name, "1").reference

    def test_has_its_numbers_tied_to_their_data(self, name: str, run: str, mlflow: MlflowClient) -> None:
        model = tracking.log_model_evidence(name, run, {"release": "r"}, {"perplexity.test": (12.5, "test", "d" * 64)})
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
        run = tracking.open_parent("one", {}, {})
        for letter in "ab":
            tracking.register_version(name, reference(letter), run, {})

    def test_that_nobody_set_names_nothing(self, name: str) -> None:
        assert tracking.aliased(name, "champion") is None
        assert tracking.aliased("no-such-model", "champion") is None

    def test_of_a_server_that_is_away_is_an_error_and_not_nothing(self, name: str, away: pytest.MonkeyPatch) -> None:
        away.setenv(*AWAY)
        with pytest.raises(MlflowException):
            tracking.aliased(name, "champion")
        with pytest.raises(MlflowException):
            tracking.version_of(name, "1")

    def test_moves(self, name: str) -> None:
        tracking.set_alias(name, "champion", "1")
        tracking.set_alias(name, "champion", "2")
        champion = tracking.aliased(name, "champion")
        assert champion is not None
        assert (champion.version, champion.aliases) == ("2", ("champion",))

    def test_is_not_set_again_since_webhooks_would_fire(
        self, name: str, mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tracking.set_alias(name, "champion", "1")
        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lambda *_: pytest.fail("set a second time"))
        tracking.set_alias(name, "champion", "1")

    def test_is_dropped_only_from_the_version_that_has_it(self, name: str) -> None:
        tracking.set_alias(name, "challenger", "2")
        tracking.drop_alias(name, "challenger", "1")
        assert tracking.aliased(name, "challenger") is not None
        tracking.drop_alias(name, "challenger", "2")
        assert tracking.aliased(name, "challenger") is None
