"""A run on a cluster, and the cells of a comparison: their end is the report in the store, whatever the server says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from kfp_server_api import V2beta1Run
from rich.console import Console

from components.lib.errors import Refusal, StageFailed
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.store.runs import leave_end, leave_failure, leave_stage
from components.lib.store.store import Store
from pipeline.kubeflow.profile import Profile
from pipeline.runners.docker import DockerRunner
from pipeline.runners.kubeflow import KubeflowRunner
from pipeline.runners.local import LocalRunner
from pipeline.runners.run import run
from pipeline.runners.runner import CellNews
from tests.pipeline.kubeflow.server import KubeflowServer
from tests.pipeline.runners.conftest import leave_report

RELEASE = "owner/model@main"


def test_a_run_on_a_cluster_ends_with_the_report_of_the_store(
    on_cluster: KubeflowRunner, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.on_run = lambda sent: leave_report(tmp_path / "stages", sent.display_name)
    cluster.looks = [("RUNNING", {"root": "RUNNING", "pin-driver": "SUCCEEDED"}), ("SUCCEEDED", {"pin": "SUCCEEDED"})]

    result = run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)

    (sent,) = cluster.runs
    assert result.report.candidate.layers == 9
    assert (result.folder / "report.html").exists()
    printed = shown.file.getvalue()  # type: ignore[attr-defined]
    assert f"/#/runs/details/{sent.run_id}" in printed
    assert "[ 1/12] pin: done in 7.0 s" in printed
    assert "driver" not in printed


def test_a_clusters_run_sees_references_alone(
    on_cluster: KubeflowRunner, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.on_run = lambda sent: leave_report(tmp_path / "stages", sent.display_name)
    run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)

    sent = cluster.runs[0].runtime_config.parameters
    assert set(sent) == {"release", "recipe", "name", "run"}
    assert str(tmp_path) not in json.dumps(sent)
    for _, text in parse_recipe(sent["recipe"]).texts():
        assert (text.path or "").startswith("s3://")


def test_a_stages_refusal_on_a_cluster_reaches_the_person(
    on_cluster: KubeflowRunner, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.on_run = lambda sent: leave_failure(sent.display_name, "pin", Refusal("no such model: name another"))
    cluster.looks = [("FAILED", {"pin": "FAILED"})]
    with pytest.raises(Refusal, match=r"^no such model: name another$"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)


def test_a_stage_that_was_killed_is_told_with_the_runs_address(
    on_cluster: KubeflowRunner, cluster: KubeflowServer, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    cluster.looks = [("FAILED", {"pin": "SUCCEEDED", "regularize": "FAILED"})]
    with pytest.raises(StageFailed, match=r"^regularize failed \(http://.*/#/runs/details/run-1\)$"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)


def test_a_run_that_succeeded_and_left_no_report_is_an_error(
    on_cluster: KubeflowRunner, recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    with pytest.raises(StageFailed, match=r"left no report\.json"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=on_cluster)


def test_an_image_without_a_digest_is_refused_before_anything_is_stored(
    environment: dict[str, str], recipe: Recipe, tmp_path: Path, shown: Console
) -> None:
    profile = Profile.load("plain", "espalier:cpu")
    with pytest.raises(Refusal, match="has no digest"):
        run(recipe, RELEASE, "tiny", tmp_path / "home", shown, on=KubeflowRunner(profile))
    assert Store.from_environment().folders("texts") == []


def test_runners_say_whether_the_services_may_be_embedded(on_cluster: KubeflowRunner) -> None:
    assert [place.embeds for place in (LocalRunner(), DockerRunner(), on_cluster)] == [True, True, False]


class TestCells:
    """The cells of a comparison: one run of one pipeline, and their news from the store."""

    @pytest.fixture
    def news(self, on_cluster: KubeflowRunner, shown: Console) -> Callable[..., Iterator[CellNews]]:
        def news(*cells: str, on: KubeflowRunner = on_cluster) -> Iterator[CellNews]:
            return on.run_cells("comparison-1", RELEASE, {cell: f"recipe of {cell}" for cell in cells}, shown)

        return news

    @pytest.fixture
    def ends(self, cluster: KubeflowServer, tmp_path: Path) -> Callable[[Mapping[str, Exception | None]], None]:
        """Let each cell that a run takes end in this way; a cell that is not named does not begin."""

        def ends(how: Mapping[str, Exception | None]) -> None:
            def on_run(sent: V2beta1Run) -> None:
                for cell in taken(sent) & set(how):
                    error = how[cell]
                    if error:
                        leave_failure(cell, "prune", error)
                    else:
                        leave_report(tmp_path / cell, cell)
                    leave_end(cell, succeeded=error is None)

            cluster.on_run = on_run

        return ends

    def test_are_a_parameter_of_one_run_with_bounded_parallelism(
        self, news: Callable[..., Iterator[CellNews]], ends: Callable[..., None], cluster: KubeflowServer
    ) -> None:
        ends({"one": None, "two": None})
        assert list(news("one", "two")) == [CellNews("one"), CellNews("two")]
        (sent,) = cluster.runs
        assert sent.display_name == "comparison-1"
        assert sent.runtime_config.parameters == {
            "release": RELEASE,
            "cells": [{"recipe": "recipe of one", "run": "one"}, {"recipe": "recipe of two", "run": "two"}],
        }
        pipeline = next(yaml.safe_load_all(cluster.uploads[-1]))
        assert pipeline["root"]["dag"]["tasks"]["for-loop-1"]["iteratorPolicy"] == {"parallelismLimit": 2}

    def test_tell_their_stages_while_they_run(
        self, news: Callable[..., Iterator[CellNews]], cluster: KubeflowServer, tmp_path: Path
    ) -> None:
        cluster.looks = [("RUNNING", {})] * 4 + [("SUCCEEDED", {})]
        told = news("one")
        cluster.on_run = lambda sent: leave_stage("one", "pin")
        assert next(told) == CellNews("one", stage="pin")
        leave_stage("one", "register")
        leave_report(tmp_path, "one")
        assert next(told) == CellNews("one", stage="register")
        leave_end("one", succeeded=True)
        assert list(told) == [CellNews("one")]

    def test_that_fail_give_the_reason_that_their_stage_left(
        self, news: Callable[..., Iterator[CellNews]], ends: Callable[..., None], cluster: KubeflowServer
    ) -> None:
        ends({"one": ValueError("other logits"), "two": Refusal("no layer stays: lower the ratio"), "three": None})
        cluster.looks = [("FAILED", {})]
        one, two, three = news("one", "two", "three")
        assert str(one.error) == f"prune: ValueError: other logits ({address(cluster)})"
        assert isinstance(two.error, Refusal)
        assert str(two.error) == "no layer stays: lower the ratio"
        assert three == CellNews("three")

    def test_that_did_not_begin_are_submitted_again(
        self, news: Callable[..., Iterator[CellNews]], ends: Callable[..., None], cluster: KubeflowServer
    ) -> None:
        """Argo starts no further cell after one has failed."""
        ends({"one": ValueError("other logits")})
        cluster.looks = [("FAILED", {}), ("SUCCEEDED", {})]
        told = news("one", "two")
        assert next(told).run == "one"
        ends({"two": None})
        assert list(told) == [CellNews("two")]
        assert [taken(sent) for sent in cluster.runs] == [{"one", "two"}, {"two"}]

    @pytest.mark.parametrize(("state", "ended"), [("FAILED", ()), ("CANCELED", ("one",))])
    def test_of_a_run_that_ended_none_or_was_cancelled_are_not_submitted_again(
        self,
        state: str,
        ended: tuple[str, ...],
        news: Callable[..., Iterator[CellNews]],
        ends: Callable[..., None],
        cluster: KubeflowServer,
    ) -> None:
        ends(dict.fromkeys(ended))
        cluster.looks = [(state, {})]
        *_, last = news("one", "two")
        assert last.run == "two"
        assert str(last.error) == f"the run {state.lower()} before the cell ended ({address(cluster)})"
        assert len(cluster.runs) == 1

    def test_forget_how_an_earlier_attempt_ended(
        self, news: Callable[..., Iterator[CellNews]], ends: Callable[..., None]
    ) -> None:
        leave_failure("one", "regularize", RuntimeError("the node went away"))
        leave_end("one", succeeded=False)
        ends({"one": None})
        assert list(news("one")) == [CellNews("one")]

    def test_of_a_run_that_still_goes_on_are_followed(
        self,
        news: Callable[..., Iterator[CellNews]],
        ends: Callable[..., None],
        cluster: KubeflowServer,
        tmp_path: Path,
    ) -> None:
        cluster.on_run = lambda sent: leave_stage("one", "pin")
        cluster.looks = [("RUNNING", {})]
        next(news("one"))  # the command is stopped here

        cluster.looks = [("RUNNING", {}), ("SUCCEEDED", {})]
        leave_report(tmp_path, "one")
        leave_end("one", succeeded=True)
        ends({"two": None})
        assert [one.run for one in news("one", "two") if not one.stage] == ["one", "two"]
        assert [taken(sent) for sent in cluster.runs] == [{"one"}, {"two"}]

    def test_that_do_not_fit_into_one_run_take_several(
        self,
        news: Callable[..., Iterator[CellNews]],
        ends: Callable[..., None],
        cluster: KubeflowServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("pipeline.runners.kubeflow.CELLS_BYTES", 100)
        ends(dict.fromkeys(["one", "two", "three"]))
        assert len(list(news("one", "two", "three"))) == 3
        assert [taken(sent) for sent in cluster.runs] == [{"one", "two"}, {"three"}]


def taken(sent: V2beta1Run) -> set[str]:
    """The cells that a run was given."""
    return {cell["run"] for cell in sent.runtime_config.parameters["cells"]}


def address(cluster: KubeflowServer) -> str:
    """The page of the first run."""
    return f"{cluster.address}/#/runs/details/run-1"
