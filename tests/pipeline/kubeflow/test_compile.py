"""The compiled pipeline: as it was when somebody last looked at it, readable by Kubeflow, and the same on every machine.

ESPALIER_GOLDEN=write python -m pytest tests/pipeline/kubeflow/test_compile.py
"""

from __future__ import annotations

import os
import re
import socket
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from components.lib.errors import Refusal
from pipeline.compare.pipeline import compare_pipeline
from pipeline.kubeflow.compile import compile_pipeline, configured_for_cluster
from pipeline.kubeflow.profile import PROFILES, Profile
from pipeline.recompress import recompress

GOLDEN = Path(__file__).parent / "golden"
IMAGE = "registry.example.org/espalier@sha256:" + "0123456789abcdef" * 4
RESUMING = {"regularize", "control", "control-2", "lora-rft"}


@cache
def compiled(profile: str) -> str:
    text = compile_pipeline(recompress, Profile.load(profile, IMAGE))
    return re.sub(r"^sdkVersion: .*$", "sdkVersion: kfp", text, flags=re.M)


@cache
def documents(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pipeline as the profile `plain` runs it, and what Kubernetes is told: the first one, or a comparison's three cells side by side."""
    if kind == "recompress":
        pipeline, platform = yaml.safe_load_all(compiled("plain"))
    else:
        profile = Profile.load("plain", IMAGE)
        made = compare_pipeline(3, configured_for_cluster(recompress, profile))
        pipeline, platform = yaml.safe_load_all(compile_pipeline(made, profile))
    return pipeline, platform


def cells() -> dict[str, Any]:
    """The one task of the comparison's loop."""
    (cell,) = documents("compare")[0]["components"]["comp-for-loop-1"]["dag"]["tasks"].values()
    return dict(cell)


def parsed(profile: str) -> tuple[Any, Any]:
    pipeline, platform = yaml.safe_load_all(compiled(profile))
    return (
        json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec()),
        json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec()),
    )


def executors(profile: str) -> dict[str, Any]:
    return {name.removeprefix("exec-"): one for name, one in parsed(profile)[0].deployment_spec["executors"].items()}


def on_kubernetes(profile: str) -> dict[str, Any]:
    found = parsed(profile)[1].platforms["kubernetes"].deployment_spec.executors
    return {name.removeprefix("exec-"): json_format.MessageToDict(one) for name, one in found.items()}


def tasks(profile: str) -> dict[str, Any]:
    spec = parsed(profile)[0]
    inner = spec.components["comp-exit-handler-1"].dag.tasks
    return {**spec.root.dag.tasks, **inner}


@pytest.mark.parametrize("profile", ["plain", "nvidia"])
def test_the_yaml_is_the_golden_one(profile: str) -> None:
    golden = GOLDEN / f"recompress-{profile}.yaml"
    if os.environ.get("ESPALIER_GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(compiled(profile))
    assert compiled(profile) == golden.read_text(), "look at the difference, then write it with ESPALIER_GOLDEN=write"


def test_compiled_twice_it_is_the_same() -> None:
    compiled.cache_clear()
    first = compiled("nvidia")
    compiled.cache_clear()
    assert compiled("nvidia") == first


@pytest.mark.parametrize("profile", ["plain", "nvidia", "aws-irsa"])
def test_every_task_runs_the_pinned_image_and_is_not_cached_by_kubeflow(profile: str) -> None:
    assert {one["container"]["image"] for one in executors(profile).values()} == {IMAGE}
    assert not [name for name, task in tasks(profile).items() if task.caching_options.enable_cache]
    for image in re.findall(r"^\s*image: (\S+)$", compiled(profile), flags=re.M):
        assert re.search(r"@sha256:[0-9a-f]{64}$", image)


@pytest.mark.parametrize("profile", ["plain", "nvidia", "aws-irsa"])
def test_it_holds_no_secret_and_nothing_of_this_machine(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    monkeypatch.setenv("HF_TOKEN", "hf_hush")
    compiled.cache_clear()
    text = compiled(profile)
    here = {str(Path.cwd()), str(Path.home()), socket.gethostname(), "/tmp/"}
    # A host may be called by a word that stands in any text.
    assert not [word for word in here if len(word) > 4 and word in text]
    assert "hush" not in text
    # A secret stands in it by its name and its key alone.
    for one in executors(profile).values():
        assert not [item["name"] for item in one["container"]["env"] if re.search("KEY|SECRET|TOKEN", item["name"])]
    for one in on_kubernetes(profile).values():
        assert all(set(each) <= {"secretKey", "envVar"} for secret in one["secretAsEnv"] for each in secret["keyToEnv"])


def test_a_secret_is_mounted_into_the_stages_that_are_named_and_no_other(tmp_path: Path) -> None:
    profile = yaml.safe_load((PROFILES / "plain.yaml").read_text())
    profile["secrets"] = [{"name": "espalier-signer", "mount": "/etc/espalier/signer", "stages": ["register"]}]
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(profile))
    volumes = {name: one.get("secretAsVolume", []) for name, one in on_kubernetes(str(file)).items()}
    [(name, [mounted])] = [(name, mounted) for name, mounted in volumes.items() if mounted]
    assert name == "register"
    assert (mounted["secretName"], mounted["mountPath"]) == ("espalier-signer", "/etc/espalier/signer")


def test_secrets_for_s3_mlflow_and_the_hub_are_named_for_every_task() -> None:
    for name, one in on_kubernetes("plain").items():
        keys = {each["envVar"] for secret in one["secretAsEnv"] for each in secret["keyToEnv"]}
        assert {"AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"} <= keys, name


def test_a_computing_stage_gets_its_gpu_its_node_its_memory_and_its_time() -> None:
    container = executors("nvidia")["regularize"]["container"]
    assert container["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert container["resources"]["accelerator"]["resourceCount"] == "1"
    assert container["resources"]["resourceCpuRequest"] == "8"
    assert container["resources"]["resourceMemoryLimit"] == "64Gi"
    pod = on_kubernetes("nvidia")["regularize"]
    assert pod["nodeSelector"] == {"labels": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["activeDeadlineSeconds"] == "172800"
    mounts = {mount["mountPath"]: mount for mount in pod["emptyDirMounts"]}
    assert mounts["/dev/shm"] == {
        "volumeName": "shared-memory",
        "mountPath": "/dev/shm",
        "medium": "Memory",
        "sizeLimit": "8Gi",
    }
    assert mounts["/scratch"]["sizeLimit"] == "200Gi"


def test_a_small_stage_gets_no_gpu() -> None:
    assert "accelerator" not in executors("nvidia")["register"]["container"]["resources"]
    assert "tolerations" not in on_kubernetes("nvidia")["register"]


@pytest.mark.parametrize("profile", ["plain", "nvidia", "aws-irsa"])
def test_the_stages_that_resume_are_tried_again_with_back_off_for_as_long_as_their_tries_may_take(profile: str) -> None:
    for name in RESUMING:
        policy = tasks(profile)[name].retry_policy
        timeout = int(on_kubernetes(profile)[name]["activeDeadlineSeconds"])
        assert policy.max_retry_count == 4
        assert policy.backoff_duration.seconds == 60
        assert policy.backoff_factor == 2.0
        assert policy.backoff_max_duration.seconds > 5 * timeout


def test_the_run_is_closed_with_the_state_that_kubeflow_reports() -> None:
    finish = tasks("plain")["finish"]
    assert finish.trigger_policy.strategy == finish.trigger_policy.TriggerStrategy.ALL_UPSTREAM_TASKS_COMPLETED
    assert list(finish.dependent_tasks) == ["exit-handler-1"]
    assert "status" in finish.inputs.parameters


def test_a_run_takes_a_handful_of_parameters() -> None:
    assert set(parsed("plain")[0].root.input_definitions.parameters) == {"release", "recipe", "name", "run"}


def test_a_mutable_tag_is_refused_and_can_be_allowed() -> None:
    profile = Profile.load("plain", "espalier:cpu")
    with pytest.raises(Refusal, match="'espalier:cpu' has no digest"):
        compile_pipeline(recompress, profile)
    executors = configured_for_cluster(recompress, profile, mutable=True).pipeline_spec.deployment_spec["executors"]
    assert {one["container"]["image"] for one in executors.values()} == {"espalier:cpu"}


def test_to_dress_a_pipeline_leaves_the_plain_one_as_it_was() -> None:
    compiled("nvidia")
    spec = recompress.pipeline_spec.deployment_spec["executors"]
    assert {one["container"]["image"] for one in spec.values()} == {"espalier"}
    assert all("env" not in one["container"] for one in spec.values())


class TestTheCellsOfAComparison:
    """Each runs the first pipeline as it is: nothing of it is written a second time."""

    def test_run_side_by_side_in_a_bounded_number(self) -> None:
        root = documents("compare")[0]["root"]
        assert set(root["inputDefinitions"]["parameters"]) == {"release", "cells"}
        (loop,) = root["dag"]["tasks"].values()
        assert loop["iteratorPolicy"] == {"parallelismLimit": 3}
        assert loop["parameterIterator"]["items"] == {"inputParameter": "pipelinechannel--cells"}

    def test_are_the_whole_first_pipeline_with_its_exit_handler_and_resources(self) -> None:
        (first, platform), (comparison, its_platform) = documents("recompress"), documents("compare")
        assert comparison["components"][cells()["componentRef"]["name"]]["dag"] == first["root"]["dag"]
        assert comparison["components"]["comp-exit-handler-1"] == first["components"]["comp-exit-handler-1"]
        assert comparison["deploymentSpec"] == first["deploymentSpec"]
        assert its_platform == platform

    def test_take_their_recipe_and_label_and_register_nothing(self) -> None:
        given = cells()["inputs"]["parameters"]
        assert given["name"] == {"runtimeValue": {"constant": ""}}
        assert {name: given[name]["parameterExpressionSelector"] for name in ("recipe", "run")} == {
            name: f'parseJson(string_value)["{name}"]' for name in ("recipe", "run")
        }
