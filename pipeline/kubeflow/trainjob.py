"""The TrainJob of a stage on several nodes: what the profile gives the stage, given to each node.

kfp's TaskConfig hands a task's settings to such a job too, but neither the image nor the volumes for scratch and shared memory, the
secrets of the registry and the deadline; and it is a property of the component, whatever the profile. So the manifest is written here, when the pipeline is
compiled, and `components.lib.stage.nodes` gives it a name and arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.kubeflow.profile import Needs, Profile, Secret

QUEUE = "kueue.x-k8s.io/queue-name"

COMMAND = ["python", "-m", "components.lib.stage.nodes"]


def train_job(profile: Profile, stage: str) -> dict[str, Any]:
    """Return the manifest of a stage's TrainJob without its name and arguments, as the client's model writes it."""
    # It takes seconds to import.
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    return TrainerV1alpha1TrainJob.from_dict(_manifest(profile, stage)).to_dict()


def _manifest(profile: Profile, stage: str) -> dict[str, Any]:
    needs, trainer = profile.needs(stage), profile.trainer
    secrets = [secret for secret in profile.secrets if stage in (secret.stages or [stage])]
    patch = {"name": "node", "template": {"spec": {"template": {"spec": _pod(profile, needs, secrets)}}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"labels": {QUEUE: trainer.queue} if trainer.queue else {}},
        "spec": {
            "runtimeRef": {"name": trainer.runtime, "kind": trainer.kind},
            "trainer": {
                "image": profile.image,
                "command": COMMAND,
                "numNodes": needs.nodes,
                "env": [*_environment(profile, secrets)],
                "resourcesPerNode": _resources(needs),
            },
            "runtimePatches": [
                {
                    "manager": "espalier",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
                }
            ],
            # A job whose task was lost ends by itself.
            **({"activeDeadlineSeconds": needs.timeout} if needs.timeout else {}),
        },
    }


def _environment(profile: Profile, secrets: list[Secret]) -> Iterator[dict[str, Any]]:
    for name, value in profile.environment.items():
        yield {"name": name, "value": value}
    for secret in secrets:
        for variable, key in secret.keys.items():
            reference = {"name": secret.name, "key": key, "optional": secret.optional}
            yield {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _resources(needs: Needs) -> dict[str, dict[str, str]]:
    requests = {"cpu": needs.cpu, "memory": needs.memory}
    limits = {"memory": needs.memory}
    if needs.gpu:
        limits[needs.gpu.type] = requests[needs.gpu.type] = str(needs.gpu.count)
    given = {"requests": requests, "limits": limits}
    return {kind: {name: value for name, value in values.items() if value} for kind, values in given.items()}


def _pod(profile: Profile, needs: Needs, secrets: list[Secret]) -> dict[str, Any]:
    """Return the part of the nodes' pods that the profile decides; the rest is the runtime's."""
    from pipeline.kubeflow.profile import SCRATCH

    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    for secret in secrets:
        if secret.mount:
            volumes.append({"name": secret.name, "secret": {"secretName": secret.name, "optional": secret.optional}})
            mounts.append({"name": secret.name, "mountPath": secret.mount})
    empty = {"shared-memory": ("/dev/shm", needs.shared_memory), "scratch": (SCRATCH, needs.scratch)}
    for name, (path, size) in empty.items():
        if size:
            medium = {"medium": "Memory"} if name == "shared-memory" else {}
            volumes.append({"name": name, "emptyDir": {**medium, "sizeLimit": size}})
            mounts.append({"name": name, "mountPath": path})
    pod = {
        "serviceAccountName": profile.service_account,
        "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
        "nodeSelector": needs.node_selector,
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in needs.tolerations],
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}] if mounts else [],
    }
    return {name: value for name, value in pod.items() if value}
