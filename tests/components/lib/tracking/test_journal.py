"""A stage's metrics and progress, on a real MLflow and while it is away."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from components.lib.tracking import journal as journals
from tests.components.lib.tracking.given import AWAY, a_run


class TestNumbers:
    def curve(self, mlflow: MlflowClient, run_id: str, metric: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in mlflow.get_metric_history(run_id, metric)]

    def test_are_curves_in_mlflow_and_lines_of_a_file(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        with a_run("one", tmp_path) as journal:
            journal.metrics({"loss": 3.0, "rate": 0.1}, 1)
            journal.metrics({"loss": 2.0}, 2)
            journal.flush()
        assert self.curve(mlflow, journal.run_id, "loss") == [(1, 3.0), (2, 2.0)]
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines == [{"step": 1, "loss": 3.0, "rate": 0.1}, {"step": 2, "loss": 2.0}]

    def test_of_more_than_one_call_to_mlflow_all_arrive(self, mlflow: MlflowClient, tmp_path: Path) -> None:
        with a_run("one", tmp_path) as journal:
            for step in range(1100):
                journal.metrics({"loss": float(step)}, step)
            journal.flush()
        assert len(self.curve(mlflow, journal.run_id, "loss")) == 1100

    def test_wait_while_mlflow_is_away_and_are_sent_when_it_is_back(
        self, mlflow: MlflowClient, tmp_path: Path, away: pytest.MonkeyPatch
    ) -> None:
        with a_run("one", tmp_path) as journal:
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
        with a_run("one", tmp_path) as journal, monkeypatch.context() as patch:
            patch.setattr(journals, "time", clock)
            patch.setattr(journals, "client", lambda: asked.append(len(lines)))
            journal._flushed = 0.0
            for second in range(1, 2001):
                lines.append(second)
                journal.metrics({"loss": 1.0}, second)
        gaps = [later - earlier for earlier, later in pairwise(asked)]
        assert gaps[:3] == [11, 21, 41]
        assert max(gaps) == journals.LONGEST_PAUSE + 1

    def test_beside_the_bar_are_told_a_few_times_a_second_and_at_the_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        emitted: list[int] = []
        now = [0.0]
        monkeypatch.setattr(journals, "time", SimpleNamespace(monotonic=lambda: now[0]))
        journal = journals.StageJournal("run", tmp_path, lambda event, **details: emitted.append(details["done"]))
        for done in range(1, 101):
            now[0] = done / 10
            journal.progress(done, 100, loss=1.0)
        assert emitted[-1] == 100
        gaps = [later - earlier for earlier, later in pairwise(emitted[:-1])]
        assert gaps
        assert min(gaps) >= 10 * journals.PROGRESS_SECONDS - 1e-6
