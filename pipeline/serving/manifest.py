"""Manifests that serve a registered version: for KServe, for vLLM itself, and for Docker Compose.

    print(manifest(registry.find_version("my-model@champion"), Profile.load("nvidia")))

A manifest names the version by the immutable prefix of its files and by their digest. It holds no date and no alias, so the same
version and profile give the same bytes, and the file can be kept in git.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import yaml

from components.lib.errors import Refusal
from components.lib.tracking.registry import Version
from pipeline.kubeflow.profile import Profile, Serving

Form = Literal["InferenceService", "LLMInferenceService", "vllm", "compose"]

PORT = 8000
_LONGEST = 53
"""Characters of a name: KServe makes names of pods and routes from it, which Kubernetes limits to 63."""
_IMAGE = re.compile(r"oci://\S+@sha256:[0-9a-f]{64}")


def manifest(version: Version, profile: Profile, form: Form = "InferenceService", uri: str | None = None) -> str:
    """Return the manifest that serves the version, as YAML.

    Args:
        version: a version that espalier registered.
        profile: its section `serving` names the service account, the resources and the options of vLLM.
        form: a kind of KServe; `vllm`, the file of `vllm serve --config`; or `compose`.
        uri: another place of the same files: an image, `oci://registry/name@sha256:…`.

    Raises:
        Refusal: the version was not registered by espalier, its name cannot be a Kubernetes name, or the URI can change.
    """
    if uri is not None and not _IMAGE.fullmatch(uri):
        raise Refusal(
            f"--uri is {uri!r}, which may name other files later: write oci://registry/name@sha256:<64 digits>"
        )
    if uri is not None and form in {"vllm", "compose"}:
        raise Refusal(f"--uri is an image, which {form} cannot read: leave it out, or choose a kind of KServe")
    place = uri or f"{version.reference.uri}/model"
    serving = profile.serving
    if form == "InferenceService":
        content = _inference_service(version, serving, place)
    elif form == "LLMInferenceService":
        content = _llm_inference_service(version, serving, place)
    elif form == "vllm":
        content = _vllm(version, serving, place) | {"host": "127.0.0.1", "port": PORT}
    else:
        content = _compose(version, profile, place)
    return _header(version) + yaml.safe_dump(content, sort_keys=False, width=1000)


def annotations_of(version: Version) -> dict[str, str]:
    """Return what the manifest says of the version, by the names of its tags in MLflow."""
    carried = {name: version.tags.get(f"espalier.{name}", "") for name in ("release", "revision")}
    return {
        "espalier.model": version.name,
        "espalier.version": version.version,
        "espalier.digest": f"sha256:{version.reference.digest}",
        **{f"espalier.{name}": value for name, value in carried.items() if value},
    }


def kubernetes_name(name: str) -> str:
    """Return the registered model's name as Kubernetes takes it: lower case, and '-' for '.' and '_'.

    Raises:
        Refusal: it is too long, or does not begin with a letter.
    """
    written = re.sub(r"[._]", "-", name.lower()).strip("-")
    if len(written) > _LONGEST or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", written):
        raise Refusal(
            f"the registered model's name {name!r} cannot be a name in Kubernetes: "
            f"register it under one of at most {_LONGEST} characters that begins with a letter"
        )
    return written


def _inference_service(version: Version, serving: Serving, uri: str) -> dict[str, Any]:
    arguments = {"model_name": version.name, "backend": "vllm", **serving.vllm}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": _metadata(version, serving),
        "spec": {
            "predictor": {
                "minReplicas": serving.replicas,
                **_account(serving),
                "model": {
                    "modelFormat": {"name": "huggingface"},
                    "storageUri": uri,
                    "args": _arguments(arguments),
                    "resources": _resources(serving),
                },
            }
        },
    }


def _llm_inference_service(version: Version, serving: Serving, uri: str) -> dict[str, Any]:
    # KServe's own template gives the container its image and command; this one adds to it.
    container: dict[str, Any] = {"name": "main", "resources": _resources(serving)}
    if serving.vllm:
        container["env"] = [{"name": "VLLM_ADDITIONAL_ARGS", "value": " ".join(_arguments(serving.vllm))}]
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LLMInferenceService",
        "metadata": _metadata(version, serving),
        "spec": {
            "model": {"uri": uri, "name": version.name},
            "replicas": serving.replicas,
            "template": {**_account(serving), "containers": [container]},
            "router": {"route": {}, "gateway": {}, "scheduler": {}},
        },
    }


def _vllm(version: Version, serving: Serving, uri: str) -> dict[str, Any]:
    given = {name: value for name, value in serving.vllm.items() if value is not False}
    # The loader that reads safetensors straight from S3; in vLLM's images it is installed.
    return {"model": uri, "served-model-name": version.name, "load-format": "runai_streamer", **given}


def _compose(version: Version, profile: Profile, uri: str) -> dict[str, Any]:
    serving = profile.serving
    if not serving.image:
        raise Refusal(
            "the profile's field serving.image is missing: name the image of vLLM as registry/vllm@sha256:<64 digits>"
        )
    environment: dict[str, str | None] = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    if endpoint := profile.environment.get("AWS_ENDPOINT_URL_S3"):
        # The streamer reads this name, and most servers of one's own know buckets by path alone.
        environment |= {"AWS_ENDPOINT_URL": endpoint, "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}
    service: dict[str, Any] = {
        "image": serving.image,
        "command": _arguments(_vllm(version, serving, uri)),
        "environment": environment,
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "labels": annotations_of(version),
    }
    if serving.gpu:
        device = {"driver": "nvidia", "count": serving.gpu.count, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return {"services": {kubernetes_name(version.name): service}}


def _metadata(version: Version, serving: Serving) -> dict[str, Any]:
    return {
        "name": kubernetes_name(version.name),
        **({"namespace": serving.namespace} if serving.namespace else {}),
        "labels": {"app.kubernetes.io/managed-by": "espalier"},
        "annotations": annotations_of(version),
    }


def _account(serving: Serving) -> dict[str, str]:
    return {"serviceAccountName": serving.service_account} if serving.service_account else {}


def _resources(serving: Serving) -> dict[str, dict[str, str]]:
    gpu = {serving.gpu.type: str(serving.gpu.count)} if serving.gpu else {}
    return {
        "requests": {"cpu": serving.cpu, "memory": serving.memory, **gpu},
        "limits": {"memory": serving.memory, **gpu},
    }


def _arguments(options: dict[str, Any]) -> list[str]:
    """Write options as a command line has them; a false one is left out."""
    given = {name: value for name, value in options.items() if value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def _header(version: Version) -> str:
    return f"# {version.name} version {version.version}, sha256:{version.reference.digest}\n"
