"""A manifest names the files that were measured and nothing that may change, and the same version gives the same bytes."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes.client import models as kubernetes

from components.lib.errors import Refusal
from components.lib.tracking.registry import Version
from pipeline.kubeflow.profile import PROFILES, Gpu, Profile, Serving
from pipeline.serving.manifest import kubernetes_name, manifest

DIGEST = "a" * 64
PREFIX = "s3://espalier/stages/prune/k"
VERSION = Version(
    "My_model.small",
    "3",
    f"{PREFIX}/model",
    ("champion",),
    {
        "espalier.reference": f"{PREFIX}@sha256:{DIGEST}",
        "espalier.release": "org/release",
        "espalier.revision": "1" * 40,
        "espalier.verdict": "pass",
    },
)
PROFILE = Profile(
    environment={"ESPALIER_BUCKET": "espalier", "AWS_ENDPOINT_URL_S3": "http://s3:9000"},
    serving=Serving(
        namespace="models",
        service_account="reader",
        cpu="8",
        memory="32Gi",
        gpu=Gpu(count=2),
        image=f"vllm/vllm-openai@sha256:{DIGEST}",
        vllm={"max-model-len": 4096, "enforce-eager": True, "enable-lora": False},
    ),
)
BARE = Profile(environment={"ESPALIER_BUCKET": "espalier"})
KSERVE = os.environ.get("ESPALIER_KSERVE")
"""A folder with KServe's Python package: `pip install --no-deps --target FOLDER kserve==0.21.0`. Its dependencies do not fit this set."""


def test_an_inference_service_serves_the_immutable_prefix_with_its_account_and_gpus() -> None:
    found = yaml.safe_load(manifest(VERSION, PROFILE))
    assert found["metadata"] == {
        "name": "my-model-small",
        "namespace": "models",
        "labels": {"app.kubernetes.io/managed-by": "espalier"},
        "annotations": {
            "espalier.model": "My_model.small",
            "espalier.version": "3",
            "espalier.digest": f"sha256:{DIGEST}",
            "espalier.release": "org/release",
            "espalier.revision": "1" * 40,
        },
    }
    assert found["spec"]["predictor"] == {
        "minReplicas": 1,
        "serviceAccountName": "reader",
        "model": {
            "modelFormat": {"name": "huggingface"},
            "storageUri": f"{PREFIX}/model",
            "args": ["--model_name=My_model.small", "--backend=vllm", "--max-model-len=4096", "--enforce-eager"],
            "resources": {
                "requests": {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "2"},
                "limits": {"memory": "32Gi", "nvidia.com/gpu": "2"},
            },
        },
    }


def test_an_llm_inference_service_leaves_the_container_to_kserve() -> None:
    spec = yaml.safe_load(manifest(VERSION, PROFILE, "LLMInferenceService"))["spec"]
    assert spec["model"] == {"uri": f"{PREFIX}/model", "name": "My_model.small"}
    assert spec["template"]["serviceAccountName"] == "reader"
    [container] = spec["template"]["containers"]
    assert container["name"] == "main"
    assert "image" not in container
    assert container["env"] == [{"name": "VLLM_ADDITIONAL_ARGS", "value": "--max-model-len=4096 --enforce-eager"}]


@pytest.mark.parametrize("profile", ["bare", "full"])
def test_the_template_of_an_llm_inference_service_is_a_pod_that_kubernetes_knows(profile: str) -> None:
    """As KServe's Go type says; the other fields are those of that type, as read by a person."""
    spec = yaml.safe_load(manifest(VERSION, {"bare": BARE, "full": PROFILE}[profile], "LLMInferenceService"))["spec"]
    assert set(spec) == {"model", "replicas", "template", "router"}
    assert spec["router"] == {"route": {}, "gateway": {}, "scheduler": {}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec["template"]}
    kubernetes_validate.validate(pod, "1.32", strict=True)
    misspelt = pod | {"spec": spec["template"] | {"serviceAccount_name": "reader"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, "1.32", strict=True)


def test_vllm_reads_its_options_from_a_file() -> None:
    assert yaml.safe_load(manifest(VERSION, PROFILE, "vllm")) == {
        "model": f"{PREFIX}/model",
        "served-model-name": "My_model.small",
        "load-format": "runai_streamer",
        "max-model-len": 4096,
        "enforce-eager": True,
        "host": "127.0.0.1",
        "port": 8000,
    }


def test_compose_starts_vllm_on_loopback_and_takes_the_keys_from_the_shell() -> None:
    service = yaml.safe_load(manifest(VERSION, PROFILE, "compose"))["services"]["my-model-small"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["environment"]["AWS_SECRET_ACCESS_KEY"] is None
    assert service["environment"]["AWS_ENDPOINT_URL"] == "http://s3:9000"
    assert f"--model={PREFIX}/model" in service["command"]
    assert service["labels"]["espalier.digest"] == f"sha256:{DIGEST}"


def test_a_compose_file_needs_an_image_with_a_digest() -> None:
    with pytest.raises(Refusal, match=r"serving\.image is missing"):
        manifest(VERSION, BARE, "compose")


@pytest.mark.parametrize("form", ["InferenceService", "LLMInferenceService", "vllm", "compose"])
def test_neither_an_alias_nor_a_verdict_changes_the_bytes(form: Any) -> None:
    moved = Version(
        VERSION.name, VERSION.version, VERSION.source, (), {**VERSION.tags, "espalier.verdict": "fail", "other": "tag"}
    )
    assert manifest(moved, PROFILE, form) == manifest(VERSION, PROFILE, form)


def test_an_image_takes_the_place_of_the_prefix_if_it_has_a_digest() -> None:
    image = f"oci://registry.example/model@sha256:{DIGEST}"
    found = yaml.safe_load(manifest(VERSION, BARE, uri=image))
    assert found["spec"]["predictor"]["model"]["storageUri"] == image
    with pytest.raises(Refusal, match="which may name other files later"):
        manifest(VERSION, BARE, uri="oci://registry.example/model:latest")
    with pytest.raises(Refusal, match="which vllm cannot read"):
        manifest(VERSION, BARE, "vllm", uri=image)


@pytest.mark.parametrize("name", ["3-layers", "m" * 54])
def test_a_name_that_kubernetes_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(Refusal, match="cannot be a name in Kubernetes"):
        kubernetes_name(name)


def test_a_version_that_espalier_did_not_register_is_refused() -> None:
    with pytest.raises(Refusal, match=r"has no tag espalier\.reference"):
        manifest(Version("other", "1", "s3://elsewhere", (), {}), BARE)


@pytest.mark.parametrize(
    ("serving", "sentence"),
    [
        ({"vllm": {"served-model-name": "other"}}, "derived from the version"),
        ({"vllm": {"load_format": "auto"}}, "derived from the version"),
        ({"image": "vllm/vllm-openai:latest"}, "has no digest"),
        ({"gpus": 1}, r"'serving\.gpus' is not known: did you mean 'gpu'"),
    ],
)
def test_a_wrong_field_of_the_profile_is_refused(serving: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"environment": {"ESPALIER_BUCKET": "b"}, "serving": serving}))
    with pytest.raises(Refusal, match=sentence):
        Profile.load(str(path))


@pytest.fixture(scope="module")
def kserve() -> Iterator[ModuleType]:
    """KServe's client models, without the server that the package imports."""
    if KSERVE is None:
        pytest.skip("set ESPALIER_KSERVE to a folder with KServe's Python package")
    shell = ModuleType("kserve")
    shell.__path__ = [str(Path(KSERVE) / "kserve")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kserve", shell)
        yield importlib.import_module("kserve.models")


@pytest.mark.parametrize("kind", ["InferenceService", "LLMInferenceService"])
@pytest.mark.parametrize("profile", ["bare", "full", *sorted(path.stem for path in PROFILES.glob("*.yaml"))])
def test_kserves_client_knows_every_field(kind: Any, profile: str, kserve: ModuleType) -> None:
    """Its package has no schema of LLMInferenceService below `spec`, so that this part of that kind is not checked."""
    ours = {"bare": BARE, "full": PROFILE}
    content = yaml.safe_load(manifest(VERSION, ours.get(profile) or Profile.load(profile), kind))
    known = {name: _module(kserve, name) for _, name, _ in pkgutil.iter_modules(kserve.__path__)}
    types = {
        name: value for module in known.values() for name, value in vars(module).items() if isinstance(value, type)
    }
    version = content["apiVersion"].rpartition("/")[2].capitalize()
    _check(content, f"{version}{kind}", types)


def test_the_check_finds_a_field_that_is_misspelt(kserve: ModuleType) -> None:
    types = {"V1beta1ModelSpec": _module(kserve, "v1beta1_model_spec").V1beta1ModelSpec}
    with pytest.raises(AssertionError, match="V1beta1ModelSpec has no storageURI"):
        _check({"storageURI": "s3://b"}, "V1beta1ModelSpec", types)


def _module(kserve: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{kserve.__name__}.{name}")


def _check(value: Any, kind: str, types: dict[str, type]) -> None:
    """Hold a value to a type of the client: every field is known and of the declared type."""
    if items := re.fullmatch(r"list\[(.*)\]", kind):
        for part in value:
            _check(part, items[1], types)
    elif entries := re.fullmatch(r"dict\(str, (.*)\)", kind):
        for part in value.values():
            _check(part, entries[1], types)
    elif simple := {"str": str, "int": int, "bool": bool, "object": object}.get(kind):
        assert isinstance(value, simple), f"{value!r} is no {kind}"
    else:
        found = types.get(kind) or getattr(kubernetes, kind, None)
        if found is None:
            assert kind.startswith("V1alpha1LLM"), f"the client has no {kind}"
            return
        fields = {written: name for name, written in found.attribute_map.items()}
        for written, part in value.items():
            assert written in fields, f"{kind} has no {written}"
            _check(part, found.openapi_types[fields[written]], types)
