"""The whole way, as a person walks it: the command, a real S3, a real MLflow, every stage a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from components.lib.store.store import Reference, Store
from components.register.run import ADAPTER_BASE
from pipeline.services.embedded import Services
from tests.e2e.conftest import EVENT, Bench, Outcome, environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

WORKING = [
    "calibrate",
    "learn_gates",
    "regularize",
    "prune",
    "control pruned-first",
    "control dense-trained",
    "evaluate",
]


@pytest.fixture(scope="module")
def first(bench: Bench) -> Outcome:
    """The first run, whose runner and stages start as a person's do."""
    outcome = bench.run("first", forks=False)
    assert outcome.status == 0, outcome.told
    return outcome


@pytest.fixture
def named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The bench's services, named in this process's environment."""
    for name, value in Services(bench.home).up().items():
        monkeypatch.setenv(name, value)
    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def test_the_report_holds_every_model_with_its_numbers(first: Outcome) -> None:
    report = first.report
    assert {"release", "recipe", "selection", "verdict", "registered", "timing", "environment"} <= set(report)
    assert report["champion"] is None
    assert len(report["selection"]["removed"]) == 2
    for model in (report["dense"], report["candidate"], *report["controls"].values()):
        assert set(model["perplexity"]) == {"test", "other"}
        assert model["speed"]["prefill"]["1"]["tokens_per_second"] > 0
    assert report["candidate"]["layers"] == report["controls"]["pruned-first"]["layers"] == 6
    assert report["dense"]["layers"] == report["controls"]["dense-trained"]["layers"] == 8
    assert set(WORKING) < set(report["timing"])
    assert report["verdict"]["passed"]


def test_the_last_lines_are_the_paths_of_the_report(first: Outcome) -> None:
    page, data = map(Path, first.printed.splitlines()[-2:])
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(data.read_text())["registered"]["name"] == "first"


def test_the_registered_version_is_a_plain_checkpoint_with_its_evidence(
    first: Outcome, named: MlflowClient, tmp_path: Path
) -> None:
    registered = first.report["registered"]
    version = named.get_model_version("first", registered["version"])
    assert version.source == registered["source"]
    assert registered["aliases"] == ["challenger"]
    assert version.tags["espalier.verdict"] == "pass"
    assert named.get_logged_model(version.tags["espalier.logged_model"]).metrics

    reference = Reference.parse(version.tags["espalier.reference"])
    folder = Store.from_environment().get(reference, tmp_path / "artifact")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.num_hidden_layers == 6
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert "README.md" in {path.name for path in (folder / "model").iterdir()}


def test_mlflow_has_a_parent_run_and_one_nested_run_a_stage(first: Outcome, named: MlflowClient) -> None:
    experiment = named.get_experiment_by_name("espalier")
    assert experiment
    [parent] = named.search_runs([experiment.experiment_id], f"tags.`espalier.run` = '{first.folder.name}'")
    nested = named.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert sorted(run.info.run_name for run in nested) == sorted(WORKING)
    assert {run.info.status for run in [parent, *nested]} == {"FINISHED"}
    [regularize] = [run for run in nested if run.info.run_name == "regularize"]
    assert len(named.get_metric_history(regularize.info.run_id, "loss")) == 6
    assert regularize.data.params["regularize.steps"] == "6"
    assert "report.html" in {file.path for file in named.list_artifacts(parent.info.run_id)}


def test_the_same_command_again_finds_everything_made(bench: Bench, first: Outcome, named: MlflowClient) -> None:
    again = bench.run("first")
    assert again.status == 0
    assert sorted(again.stages("reused")) == sorted(WORKING)
    assert not {"calibrate", "regularize", "evaluate"} & set(again.stages("started"))
    assert len(named.search_model_versions("name = 'first'")) == 1
    assert again.report["candidate"] == first.report["candidate"]


def test_another_field_of_evaluate_runs_the_evaluation_and_what_follows(bench: Bench, first: Outcome) -> None:
    outcome = bench.run("first", "evaluate.speed.enabled=false")
    assert outcome.stages("started") == ["evaluate"]
    assert outcome.report["registered"]["version"] == first.report["registered"]["version"]


def test_the_same_layers_chosen_by_another_method_train_and_measure_nothing_again(bench: Bench) -> None:
    quick = ("evaluate.controls=[pruned-first]", "evaluate.speed.enabled=false")
    # A shortlist of every layer is SLEB's search.
    gates = bench.run("chosen", "methods.trsp.shortlist=8", *quick)
    assert gates.status == 0, gates.told
    search = bench.run("chosen", "methods={sleb: {ratio: 0.25}}", *quick)
    assert search.report["selection"]["removed"] == gates.report["selection"]["removed"]
    assert search.stages("started") == ["learn_gates", "prune"]
    assert {"regularize", "control pruned-first", "evaluate"} <= set(search.stages("reused"))


def test_why_names_the_setting_that_differs(bench: Bench, first: Outcome) -> None:
    asked = bench.run_arguments("first", ("regularize.steps=7",))[1:]
    told = bench.espalier("why", *asked)
    assert told.status == 0, told.told
    lines = {line.split()[0]: line for line in told.printed.splitlines() if line.strip()}
    assert "made" in lines["calibrate"]
    assert "to make" in lines["regularize"]
    assert "setting regularize.steps: 6 → 7" in told.printed
    assert "unknown" in lines["prune"]


def test_a_transfer_moves_what_the_layers_know_before_the_cut(bench: Bench) -> None:
    moved = bench.run(
        "moved",
        "regularize.transfer=ridge",
        "regularize.schedule=none",
        "evaluate.controls=[]",
        "evaluate.speed.enabled=false",
    )
    assert moved.status in (0, 3), moved.told
    assert {"regularize", "prune"} <= set(moved.stages("done"))
    assert moved.report["recipe"]["regularize"]["transfer"]["ridge"]["strength"] > 0
    assert moved.report["candidate"]["layers"] == 6


def test_a_killed_run_goes_on_inside_its_training_and_ends_without_layers_and_channels(bench: Bench) -> None:
    overrides = (
        "methods.dress.axes=[hidden, ffn]",
        "methods.dress.ratio={hidden: 0.25, ffn: 0.33}",
        "regularize.steps=400",
        "evaluate.controls=[]",
        "evaluate.speed.enabled=false",
    )
    process = subprocess.Popen(
        bench.command(*bench.run_arguments("killed", overrides)),
        stdout=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    _wait_for_step(bench.home / "runs", 20)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    outcome = bench.run("killed", *overrides)
    assert outcome.status == 0, outcome.told
    assert {"calibrate", "learn_gates"} <= set(outcome.stages("reused"))
    resumed = [event["done"] for event in outcome.events("progress") if event["stage"] == "regularize"]
    assert resumed[0] > 4
    assert resumed[-1] == 400

    selection, dense, candidate = (outcome.report[part] for part in ("selection", "dense", "candidate"))
    assert selection["method"] == "trsp+dress"
    assert len(selection["removed"]) == dense["layers"] - candidate["layers"] == 2
    assert len(selection["channels"]["hidden"]) == 8
    assert sorted(len(channels) for channels in selection["channels"]["ffn"]) == [0] * 2 + [16] * 6
    assert candidate["parameters"] < 0.6 * dense["parameters"]


def test_sleb_and_lora_rft_are_a_recipe_and_a_field_away(bench: Bench, named: MlflowClient) -> None:
    outcome = bench.run(
        "sleb",
        "methods={sleb: {ratio: 0.25}}",
        "regularize.schedule=none",
        "recover.enabled=true",
        "recover.keep_adapter=true",
        "evaluate.controls=[]",
        "promote.rules.quality={figure: perplexity, bound: 0.001, why: nothing can}",
    )
    assert outcome.status == 3, outcome.told
    assert {"lora_rft", "prune"} <= set(outcome.stages("done"))
    assert "regularize" in outcome.stages("skipped")
    assert [rule["name"] for rule in outcome.report["verdict"]["rules"] if not rule["passed"]] == [
        "quality[test]",
        "quality[other]",
    ]
    assert outcome.report["registered"]["aliases"] == []
    assert bench.espalier("promote", "sleb").status == 1
    [version] = named.search_model_versions("name = 'sleb'")
    assert "/stages/prune/" in version.tags[ADAPTER_BASE]
    kept = (
        Store.from_environment().manifest(Reference.parse(version.tags["espalier.reference"])).only(["adapter"]).files
    )
    assert {file.name for file in kept} == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


def test_the_challenger_becomes_champion_and_is_measured_beside_the_next(bench: Bench, first: Outcome) -> None:
    unanswered = bench.espalier("promote", "first")
    assert unanswered.status == 1
    assert "There is no terminal to ask on: pass --yes" in unanswered.told
    promoted = bench.espalier("promote", "first", "--yes", "--why", "it is the first")
    assert promoted.status == 0, promoted.told
    assert "first version 1 is champion" in promoted.printed
    assert "match their digests" in promoted.printed

    approved = ("methods.trsp.ratio=0.5", "evaluate.controls=[]", "promote.approval=auto")
    outcome = bench.run("first", *approved)
    assert outcome.status == 0, outcome.told
    assert outcome.report["champion"]["perplexity"] == first.report["candidate"]["perplexity"]
    assert outcome.report["candidate"]["layers"] == 4
    assert outcome.report["registered"]["version"] == "2"
    assert "promote" in outcome.stages("done")

    listed = bench.espalier("models", "first").printed
    assert "it is the first" in listed
    assert f"run {outcome.folder.name}" in listed.replace("\n", " ")
    differing = bench.espalier("diff", "first", "1", "champion").printed
    assert re.search(r"methods\.trsp\.ratio\s+0\.25\s+0\.5", differing)
    assert re.search(r"perplexity test\s", differing)
    assert (
        "first version 1 is champion, and version 2 was it before" in bench.espalier("rollback", "first", "-y").printed
    )

    again = bench.run("first", *approved)
    assert again.status == 0, again.told


def _wait_for_step(runs: Path, step: int) -> None:
    """Wait until some run's log tells of this step of regularize."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for log in runs.glob("killed-*/log.txt"):
            lines = [line.strip().removeprefix(EVENT) for line in log.read_text().splitlines() if EVENT in line]
            told = [json.loads(line) for line in lines]
            if any(event["stage"] == "regularize" and event.get("done", 0) >= step for event in told):
                return
        time.sleep(0.2)
    pytest.fail(f"regularize did not reach step {step}")
