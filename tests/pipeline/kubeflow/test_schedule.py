"""The watcher on a schedule: made once under its name, and told as Kubeflow's own models tell it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp_server_api as api
import pytest
import yaml
from typer.testing import CliRunner

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from pipeline.cli.main import app
from pipeline.kubeflow import schedule
from pipeline.kubeflow.client import KubeflowClient
from pipeline.kubeflow.profile import Profile, Server
from pipeline.kubeflow.schedule import Plan, check_cron, compile_watch
from tests.pipeline.kubeflow.server import KubeflowServer, _model, _named

IMAGE = "registry.example.org/espalier@sha256:" + "a" * 64
NIGHTLY = "0 0 3 * * *"
PARAMETERS = {"sources": [{"release": "owner/model", "name": "small", "recipe": "method: trsp"}], "lease_hours": 48.0}


class ScheduleServer(KubeflowServer):
    """A server that speaks of recurring runs too. As the real one does, it takes any number of them under one name."""

    def __init__(self) -> None:
        self.recurring: list[api.V2beta1RecurringRun] = []
        self.made = 0
        super().__init__()

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, content_type: str) -> Any:
        if not path.startswith("/recurringruns"):
            return super().answer(method, path, query, body, content_type)
        if (method, path) == ("POST", "/recurringruns"):
            return self._create(_model(body, "V2beta1RecurringRun"))
        if (method, path) == ("GET", "/recurringruns"):
            return self._list(query)
        identifier, _, verb = path.split("/")[2].partition(":")
        run = next(one for one in self.recurring if one.recurring_run_id == identifier)
        if method == "DELETE":
            self.recurring.remove(run)
        elif (method, verb) in {("POST", "enable"), ("POST", "disable")}:
            run.mode = verb.upper()
        else:
            raise KeyError(f"{method} {path}")
        return {}

    def _create(self, run: api.V2beta1RecurringRun) -> api.V2beta1RecurringRun:
        assert run.experiment_id in {one.experiment_id for one in self.experiments}
        assert run.pipeline_version_reference.pipeline_version_id in {one.pipeline_version_id for one in self.versions}
        self.made += 1
        run.recurring_run_id = f"recurring-{self.made}"
        self.recurring.insert(0, run)
        return run

    def _list(self, query: dict[str, str]) -> api.V2beta1ListRecurringRunsResponse:
        """Pages of one, so that who reads the first page alone is found out."""
        found = [one for one in _named(self.recurring, query) if one.experiment_id == query["experiment_id"]]
        at = int(query.get("page_token") or 0)
        token = str(at + 1) if at + 1 < len(found) else None
        return api.V2beta1ListRecurringRunsResponse(recurring_runs=found[at : at + 1], next_page_token=token)

    def _handler(self) -> Any:
        handler = super()._handler()
        handler.do_DELETE = lambda self: self._serve("DELETE")  # type: ignore[attr-defined]
        return handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScheduleServer]:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT", "KF_PIPELINES_TOKEN", "ESPALIER_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    made = ScheduleServer()
    yield made
    made.close()


@pytest.fixture
def kubeflow(server: ScheduleServer) -> KubeflowClient:
    return KubeflowClient(Server(host=server.address))


@pytest.fixture(scope="module")
def package() -> str:
    return compile_watch(Profile.load("nvidia", IMAGE), at_most=3)


@pytest.fixture
def plan() -> Plan:
    return Plan("nightly", NIGHTLY, PARAMETERS, service_account="espalier")


@pytest.mark.parametrize(
    "cron", [NIGHTLY, "*/30 * * * * *", "0 0 9 ? * 2-6", "0 15,45 8-18/2 1 Jan-Mar MON", "  0  0 3 * * * "]
)
def test_a_cron_expression_has_six_fields(cron: str) -> None:
    assert check_cron(cron) == " ".join(cron.split())


@pytest.mark.parametrize(
    ("cron", "cure"),
    [
        ("0 3 * * *", "write '0 0 3 \\* \\* \\*'"),
        ("", "has 0 fields"),
        ("@daily", "has 1 fields"),
        ("60 0 3 * * *", "'60' as its second"),
        ("0 0 24 * * *", "'24' as its hour"),
        ("0 0 3 0 * *", "'0' as its day of month"),
        ("0 0 3 * 13 *", "'13' as its month"),
        ("0 0 3 * * 7", "'7' as its day of week"),
        ("0 0 3 * * noday", "'noday' as its day of week"),
        ("0 0 5-3 * * *", "'5-3' as its hour"),
        ("0 */0 3 * * *", "'\\*/0' as its minute"),
        ("0 0, 3 * * *", "'' as its minute"),
        ("0 0 3 L * *", "'L' as its day of month"),
        ("0 0 3 1W * *", "'1W' as its day of month"),
        ("0 0 3 * * 5#2", "'5#2' as its day of week"),
        ("0 0 3 * * fri-mon", "'fri-mon' as its day of week"),
        ("r 0 3 * * *", "'r' as its second"),
    ],
)
def test_one_that_the_scheduler_does_not_read_is_refused(cron: str, cure: str) -> None:
    with pytest.raises(Refusal, match=cure):
        check_cron(cron)


def test_a_schedule_catches_nothing_up_and_runs_one_at_a_time(
    kubeflow: KubeflowClient, server: ScheduleServer, plan: Plan, package: str
) -> None:
    made, new = schedule.create(kubeflow, plan, package)
    (kept,) = server.recurring
    assert new
    assert made.recurring_run_id == kept.recurring_run_id
    assert (kept.no_catchup, int(kept.max_concurrency), kept.mode) == (True, 1, "ENABLE")
    assert kept.trigger.cron_schedule.cron == NIGHTLY
    assert kept.service_account == "espalier"
    assert kept.runtime_config.parameters == PARAMETERS
    assert kept.pipeline_spec is None, "it refers to the version that was uploaded"


def test_the_same_again_changes_nothing(
    kubeflow: KubeflowClient, server: ScheduleServer, plan: Plan, package: str
) -> None:
    first, _ = schedule.create(kubeflow, plan, package)
    schedule.pause(kubeflow, plan.name)
    again, new = schedule.create(kubeflow, plan, package)
    assert not new
    assert again.recurring_run_id == first.recurring_run_id
    assert server.made == 1
    assert server.recurring[0].mode == "DISABLE", "what a person paused stays paused"
    assert len(server.uploads) == 2, "the pipeline's first version, and the one that the digest names"


@pytest.mark.parametrize(
    "change", [{"cron": "0 0 4 * * *"}, {"parameters": PARAMETERS | {"lease_hours": 1.0}}, {"service_account": None}]
)
def test_another_plan_takes_the_place_of_the_old(
    kubeflow: KubeflowClient, server: ScheduleServer, plan: Plan, package: str, change: dict[str, Any]
) -> None:
    schedule.create(kubeflow, plan, package)
    other, new = schedule.create(kubeflow, Plan(**{**vars(plan), **change}), package)
    assert new
    assert [one.recurring_run_id for one in server.recurring] == [other.recurring_run_id]


def test_another_image_takes_the_place_of_the_old(
    kubeflow: KubeflowClient, server: ScheduleServer, plan: Plan, package: str
) -> None:
    schedule.create(kubeflow, plan, package)
    other, new = schedule.create(kubeflow, plan, package.replace("a" * 64, "b" * 64))
    assert new
    assert [one.recurring_run_id for one in server.recurring] == [other.recurring_run_id]


def test_one_too_many_is_tidied_up_though_the_server_hands_out_pages(
    kubeflow: KubeflowClient, server: ScheduleServer, plan: Plan, package: str
) -> None:
    made, _ = schedule.create(kubeflow, plan, package)
    left_over = copy.copy(server.recurring[0])
    left_over.recurring_run_id, left_over.description = "left-over", "another plan"
    server.recurring.append(left_over)
    schedule.create(kubeflow, plan, package)
    assert [one.recurring_run_id for one in server.recurring] == [made.recurring_run_id]


def test_schedules_of_other_names_are_left_alone(
    kubeflow: KubeflowClient, server: ScheduleServer, plan: Plan, package: str
) -> None:
    schedule.create(kubeflow, plan, package)
    schedule.create(kubeflow, Plan("weekly", "0 0 3 * * 0", PARAMETERS), package)
    schedule.delete(kubeflow, "nightly")
    assert [one.display_name for one in server.recurring] == ["weekly"]


def test_pause_and_resume(kubeflow: KubeflowClient, server: ScheduleServer, plan: Plan, package: str) -> None:
    schedule.create(kubeflow, plan, package)
    schedule.pause(kubeflow, "nightly")
    assert server.recurring[0].mode == "DISABLE"
    schedule.resume(kubeflow, "nightly")
    assert server.recurring[0].mode == "ENABLE"


@pytest.mark.parametrize("verb", [schedule.pause, schedule.resume, schedule.delete, schedule.find])
def test_a_schedule_that_is_not_there_is_refused(kubeflow: KubeflowClient, verb: Any) -> None:
    with pytest.raises(Refusal, match="no schedule 'nightly' in the experiment 'espalier'"):
        verb(kubeflow, "nightly")


class TestThePipeline:
    def test_takes_at_most_so_many_and_hands_them_to_the_first_pipeline(self, package: str) -> None:
        spec = next(yaml.safe_load_all(package))
        loop = spec["root"]["dag"]["tasks"]["for-loop-1"]
        assert loop["iteratorPolicy"]["parallelismLimit"] == 3
        find = spec["root"]["dag"]["tasks"]["watch"]
        assert find["inputs"]["parameters"]["at_most"]["runtimeValue"]["constant"] == 3
        (inner,) = spec["components"]["comp-for-loop-1"]["dag"]["tasks"].values()
        taken = {name: one["parameterExpressionSelector"] for name, one in inner["inputs"]["parameters"].items()}
        assert taken == {
            "release": 'parseJson(string_value)["release"]',
            "recipe": 'parseJson(string_value)["recipe"]',
            "name": 'parseJson(string_value)["model"]',
            "run": 'parseJson(string_value)["run"]',
        }

    def test_asks_anew_every_time(self, package: str) -> None:
        """A recurring run of an uploaded version ignores enable_caching, so that the pipeline itself must say it."""
        assert "enableCache: true" not in package

    def test_is_dressed_to_the_last_task(self, package: str) -> None:
        spec, platform = yaml.safe_load_all(package)
        executors = spec["deploymentSpec"]["executors"]
        dressed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        assert {"exec-watch", "exec-pin", "exec-regularize", "exec-finish"} <= set(executors)
        assert set(dressed) == set(executors)
        for name, executor in executors.items():
            assert executor["container"]["image"] == IMAGE, name
            assert dressed[name]["secretAsEnv"], name
        assert "accelerator" not in executors["exec-watch"]["container"]["resources"]

    def test_names_its_image_by_a_digest(self) -> None:
        with pytest.raises(Refusal, match="has no digest"):
            compile_watch(Profile.load("plain", "registry.example.org/espalier:latest"), at_most=1)


class TestTheVerbs:
    @pytest.fixture
    def profile(self, server: ScheduleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        settings = yaml.safe_load((Path(schedule.__file__).parents[1] / "profiles" / "plain.yaml").read_text())
        settings |= {"image": IMAGE, "kubeflow": {"host": server.address, "experiment": "nights"}}
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    @pytest.fixture
    def sources(self, tmp_path: Path) -> Path:
        text = {"hub": "owner/text"}
        recipe = {"methods": {"sleb": {"ratio": 0.25}}, "calibration": {"data": text}}
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump(recipe | {"evaluate": {"perplexity": {"text": text}}, "regularize": {"schedule": "none"}})
        )
        path = tmp_path / "sources.yaml"
        path.write_text(
            "recipe: recipe.yaml\nsources:\n  - {release: owner/model, name: small, set: [methods.sleb.ratio=0.5]}\n"
        )
        return path

    def test_create_show_pause_resume_delete(self, server: ScheduleServer, profile: Path, sources: Path) -> None:
        def say(*words: str) -> str:
            result = CliRunner().invoke(app, ["schedule", *words, "--profile", str(profile)], catch_exceptions=False)
            assert result.exit_code == 0
            return result.output

        assert "made" in say("create", str(sources), "--cron", NIGHTLY)
        assert "there already" in say("create", str(sources), "--cron", NIGHTLY)
        (kept,) = server.recurring
        assert server.experiments[0].display_name == "nights"
        (watched,) = kept.runtime_config.parameters["sources"]
        assert (watched["release"], watched["name"]) == ("owner/model", "small")
        assert parse_recipe(watched["recipe"]).methods.chosen[0].asked("layers") == 0.5
        shown = say("show")
        assert NIGHTLY in shown
        assert "enabled" in shown
        assert "owner/model as small" in shown
        say("pause")
        assert "paused" in say("show")
        say("resume")
        assert "enabled" in say("show")
        say("delete")
        assert server.recurring == []

    def test_a_folder_of_this_machine_is_refused(self, profile: Path, sources: Path, tmp_path: Path) -> None:
        sources.write_text(f"recipe: recipe.yaml\nsources:\n  - {{release: {tmp_path}, name: small}}\n")
        words = ["schedule", "create", str(sources), "--cron", NIGHTLY, "--profile", str(profile)]
        with pytest.raises(Refusal, match="is a folder of this machine"):
            CliRunner().invoke(app, words, catch_exceptions=False)

    def test_the_cron_expression_is_looked_at_first(self, sources: Path) -> None:
        words = ["schedule", "create", str(sources), "--cron", "0 3 * * *", "--profile", "nowhere.yaml"]
        with pytest.raises(Refusal, match="has 5 fields"):
            CliRunner().invoke(app, words, catch_exceptions=False)
