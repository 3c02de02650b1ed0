"""The TrainJob of a stage on several nodes: what the profile gives the stage reaches each node, in fields that Kubernetes knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from pipeline.kubeflow import trainjob
from pipeline.kubeflow.compile import compile_pipeline
from pipeline.kubeflow.profile import PROFILES, Profile
from pipeline.kubeflow.trainjob import train_job
from pipeline.recompress import recompress

kubernetes_validate = pytest.importorskip("kubernetes_validate")

IMAGE = "registry.example.org/espalier@sha256:" + "0123456789abcdef" * 4


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    """The profile `nvidia` with two stages on several nodes, and everything that a job can be given."""
    settings = yaml.safe_load((PROFILES / "nvidia.yaml").read_text())
    settings["stages"]["regularize"]["nodes"] = 4
    settings["stages"]["regularize"]["gpu"] = {"count": 8}
    settings["stages"]["control"]["nodes"] = 2
    settings |= {
        "trainer": {"runtime": "torch-a100", "kind": "TrainingRuntime", "queue": "team"},
        "service_account": "espalier",
        "image_pull_secrets": ["registry"],
    }
    settings["secrets"] += [
        {"name": "wandb", "keys": {"WANDB_API_KEY": "key"}, "mount": "/etc/wandb", "stages": ["regularize"]},
        {"name": "signer", "mount": "/etc/signer", "stages": ["register"]},
    ]
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(settings))
    return Profile.load(str(path), IMAGE)


def pod_patch(job: dict[str, Any]) -> dict[str, Any]:
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    return dict(replicated["template"]["spec"]["template"]["spec"])


def test_the_job_asks_for_its_nodes_of_the_runtime_in_the_queue(profile: Profile) -> None:
    job = train_job(profile, "regularize")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"] == {"labels": {"kueue.x-k8s.io/queue-name": "team"}}
    assert job["spec"]["runtimeRef"] == {"name": "torch-a100", "kind": "TrainingRuntime"}
    assert job["spec"]["trainer"]["numNodes"] == 4
    assert job["spec"]["activeDeadlineSeconds"] == profile.needs("regularize").timeout


def test_each_node_has_the_image_the_resources_the_variables_and_the_secrets_of_the_stage(profile: Profile) -> None:
    trainer = train_job(profile, "regularize")["spec"]["trainer"]
    assert trainer["image"] == IMAGE
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "8"},
    }
    values = {one["name"]: one["value"] for one in trainer["env"] if "value" in one}
    assert values == profile.environment
    secrets = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in trainer["env"] if "valueFrom" in one}
    assert secrets["AWS_SECRET_ACCESS_KEY"] == {"name": "espalier-s3", "key": "secret-key", "optional": False}
    assert secrets["HF_TOKEN"]["optional"]
    assert "WANDB_API_KEY" in secrets
    assert "WANDB_API_KEY" not in json.dumps(train_job(profile, "control"))


def test_each_node_stands_where_the_stage_does_with_its_volumes(profile: Profile) -> None:
    patch = pod_patch(train_job(profile, "regularize"))
    assert patch["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert patch["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert (patch["serviceAccountName"], patch["imagePullSecrets"]) == ("espalier", [{"name": "registry"}])
    volumes = {volume.pop("name"): volume for volume in patch["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in patch["containers"][0]["volumeMounts"]}
    assert mounted == {
        "/dev/shm": {"emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        "/scratch": {"emptyDir": {"sizeLimit": "200Gi"}},
        "/etc/wandb": {"secret": {"secretName": "wandb", "optional": False}},
    }


@pytest.mark.parametrize("stage", ["regularize", "control"])
def test_the_client_of_kubeflow_trainer_and_kubernetes_know_every_field(stage: str, profile: Profile) -> None:
    manifest, job = trainjob._manifest(profile, stage), train_job(profile, stage)
    assert job == manifest  # the client's model drops what it does not know
    patch, trainer = pod_patch(job), job["spec"]["trainer"]
    container = patch.pop("containers")[0] | {
        "image": trainer["image"],
        "command": trainer["command"],
        "env": trainer["env"],
        "resources": trainer["resourcesPerNode"],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": patch | {"containers": [container]}}
    kubernetes_validate.validate(pod, "1.32", strict=True)


def test_the_check_finds_a_field_that_is_misspelt(profile: Profile) -> None:
    manifest = trainjob._manifest(profile, "regularize")
    manifest["spec"]["trainer"]["nodes"] = manifest["spec"]["trainer"].pop("numNodes")
    assert TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() != manifest


def test_the_least_profile_makes_a_job_too() -> None:
    least = Profile.model_validate(
        {"image": IMAGE, "environment": {"ESPALIER_BUCKET": "espalier"}, "stages": {"regularize": {"nodes": 2}}}
    )
    assert train_job(least, "regularize") == trainjob._manifest(least, "regularize")


def test_the_task_that_waits_has_the_job_the_defaults_and_no_gpu(profile: Profile) -> None:
    pipeline, platform = yaml.safe_load_all(compile_pipeline(recompress, profile))
    spec = json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
    containers = {name: one["container"] for name, one in spec.deployment_spec["executors"].items()}
    jobs = {
        name.removeprefix("exec-"): json.loads(variable["value"])
        for name, container in containers.items()
        for variable in container["env"]
        if variable["name"] == "ESPALIER_TRAINJOB"
    }
    assert {name: job["spec"]["trainer"]["numNodes"] for name, job in jobs.items()} == {
        "regularize": 4,
        "control": 2,
        "control-2": 2,
    }
    assert jobs["regularize"] == train_job(profile, "regularize")
    resources = containers["exec-regularize"]["resources"]
    assert "accelerator" not in resources
    assert (resources["resourceCpuRequest"], resources["resourceMemoryLimit"]) == ("1", "4Gi")
    pod = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-regularize"]
    assert "nodeSelector" not in pod
    assert int(pod["activeDeadlineSeconds"]) == profile.needs("regularize").timeout
    tasks = spec.components["comp-exit-handler-1"].dag.tasks
    assert tasks["regularize"].retry_policy.max_retry_count == 4
