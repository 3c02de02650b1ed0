"""What `kubectl apply -k deploy` would apply: known to Kubernetes field by field, and of one piece with the code."""

import inspect
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.lib.recipe.loading import parse_recipe
from pipeline.cli.serving import Kind, deploy
from pipeline.cli.sources import load_sources
from pipeline.kubeflow.profile import Profile
from pipeline.kubeflow.schedule import check_cron

kubernetes_validate = pytest.importorskip("kubernetes_validate")

DEPLOY = Path(__file__).parents[2] / "deploy"
NOT_IN_THE_REPOSITORY = {"espalier-s3", "espalier-postgres", "espalier-hub", "espalier-mlflow", "espalier-webhook"}
"""The Secrets that a person makes."""


@pytest.fixture(scope="module")
def resources() -> list[dict[str, Any]]:
    return [*built(DEPLOY), *built(DEPLOY / "reconciler")]


def built(folder: Path) -> list[dict[str, Any]]:
    """What a kustomization makes."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed, so nothing builds the kustomization")
    made = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def named(resources: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in resources if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


def pods(resources: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The specification of every pod, and the namespace that it is in."""
    for one in resources:
        spec = one.get("spec") or {}
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template") if isinstance(spec, dict) else None
        if template:
            yield one["metadata"]["namespace"], template["spec"]


def containers(resources: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for _, pod in pods(resources):
        yield from pod.get("initContainers", [])
        yield from pod["containers"]


def walk(value: Any) -> Iterator[Any]:
    """Every mapping in a document."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(part)


def test_kubernetes_knows_every_field(resources: list[dict[str, Any]]) -> None:
    for one in resources:
        kubernetes_validate.validate(one, "1.32", strict=True)
    kinds = {one["kind"] for one in resources}
    assert {"Namespace", "ServiceAccount", "Deployment", "StatefulSet", "CronJob", "NetworkPolicy"} <= kinds


def test_kubernetes_knows_every_field_of_the_files_too() -> None:
    """It needs no kubectl; what the kustomizations make of the files is checked above."""
    documents = [
        one
        for path in sorted(DEPLOY.glob("*/*.yaml"))
        for one in yaml.safe_load_all(path.read_text())
        if "apiVersion" in one and one["kind"] not in {"Kustomization", "Component"}
    ]
    assert len(documents) > 8
    for one in documents:
        kubernetes_validate.validate(one, "1.32", strict=True)


def test_the_check_finds_a_field_that_is_misspelt(resources: list[dict[str, Any]]) -> None:
    service = named(resources, "Service", "mlflow")
    misspelt = service | {"spec": service["spec"] | {"selectr": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, "1.32", strict=True)


def test_every_image_is_named_by_a_digest(resources: list[dict[str, Any]]) -> None:
    images = [container["image"] for container in containers(resources)]
    assert images
    for image in images:
        assert re.fullmatch(r"[a-z0-9./-]+@sha256:[0-9a-f]{64}", image), image


def test_secrets_are_named_and_never_held(resources: list[dict[str, Any]]) -> None:
    assert not [one for one in resources if one["kind"] == "Secret"]
    references = [one["secretKeyRef"]["name"] for one in walk(resources) if "secretKeyRef" in one]
    assert references
    assert set(references) <= NOT_IN_THE_REPOSITORY
    secret = re.compile(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY)")
    for container in containers(resources):
        for variable in container.get("env", []):
            if secret.search(variable["name"]):
                assert "valueFrom" in variable, f"{variable['name']} has its value in the repository"


def test_every_pod_fits_the_restricted_standard_that_its_namespace_asks_for(resources: list[dict[str, Any]]) -> None:
    enforced = named(resources, "Namespace", "espalier")["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"
    for _, pod in pods(resources):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(resources):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["limits"]["memory"]


def test_mlflow_allows_the_name_that_the_stages_use(resources: list[dict[str, Any]]) -> None:
    profile = Profile.load(str(DEPLOY / "watcher" / "cluster.yaml"))
    (container,) = named(resources, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    (allowed,) = [part.partition("=")[2] for part in container["args"] if part.startswith("--allowed-hosts=")]
    assert profile.environment["MLFLOW_TRACKING_URI"].removeprefix("http://") in allowed.split(",")


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("profile", [str(DEPLOY / "watcher" / "cluster.yaml"), "plain", "nvidia"])
def test_the_stages_speak_to_services_that_are_here(
    resources: list[dict[str, Any]], profile: str, variable: str
) -> None:
    address = Profile.load(profile).environment[variable]
    match = re.fullmatch(r"http://([a-z0-9]+)\.([a-z0-9]+)\.svc\.cluster\.local:(\d+)", address)
    assert match, address
    service = named(resources, "Service", match[1])
    assert service["metadata"]["namespace"] == match[2]
    assert int(match[3]) in {port["port"] for port in service["spec"]["ports"]}


def test_services_find_their_pods(resources: list[dict[str, Any]]) -> None:
    labels = [
        one["spec"]["template"]["metadata"]["labels"]
        for one in resources
        if one["kind"] in {"Deployment", "StatefulSet"}
    ]
    for service in (one for one in resources if one["kind"] == "Service"):
        assert any(service["spec"]["selector"].items() <= pod.items() for pod in labels), service["metadata"]["name"]


def test_the_schedule_is_one_that_the_command_takes(resources: list[dict[str, Any]]) -> None:
    job = named(resources, "CronJob", "espalier-schedule")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = job["containers"]
    options = dict(part.removeprefix("--").split("=", 1) for part in container["args"])
    assert check_cron(options["cron"])
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    for file in (container["command"][-1], options["profile"]):
        assert str(Path(file).parent) in mounted
    config = next(volume["configMap"]["name"] for volume in job["volumes"] if "configMap" in volume)
    assert {Path(container["command"][-1]).name, Path(options["profile"]).name} <= set(
        named(resources, "ConfigMap", config)["data"]
    )


def test_the_stages_run_in_the_image_that_the_schedule_is_made_from(resources: list[dict[str, Any]]) -> None:
    job = named(resources, "CronJob", "espalier-schedule")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = job["containers"]
    assert {"name": "ESPALIER_IMAGE", "value": container["image"]} in container["env"]


def test_the_profile_names_the_account_and_secrets_that_are_here(resources: list[dict[str, Any]]) -> None:
    profile = Profile.load(str(DEPLOY / "watcher" / "cluster.yaml"))
    account = named(resources, "ServiceAccount", profile.service_account or "")
    job = named(resources, "CronJob", "espalier-schedule")
    assert account["metadata"]["namespace"] == job["metadata"]["namespace"]
    assert {secret.name for secret in profile.secrets} <= NOT_IN_THE_REPOSITORY


def test_the_sources_and_their_recipe_can_be_read_on_a_cluster() -> None:
    for watched in load_sources(DEPLOY / "watcher" / "sources.yaml", None, Path):
        for name, text in parse_recipe(watched.recipe).texts():
            assert text.hub or (text.path or "").startswith("s3://"), f"{name} is a file of some machine"


def test_the_reconciler_runs_the_command_with_a_profile_that_is_mounted(resources: list[dict[str, Any]]) -> None:
    pod = named(resources, "Deployment", "espalier-reconciler")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = [part.removeprefix("--").partition("=")[0].replace("-", "_") for part in container["args"]]
    assert set(options) <= set(inspect.signature(deploy).parameters)
    (file,) = [part.partition("=")[2] for part in container["args"] if part.startswith("--profile=")]
    assert str(Path(file).parent) in {mount["mountPath"] for mount in container["volumeMounts"]}
    config = next(volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume)
    profile = yaml.safe_load(named(resources, "ConfigMap", config)["data"][Path(file).name])
    assert profile["serving"]["namespace"] == named(resources, "ConfigMap", config)["metadata"]["namespace"]
    assert named(resources, "ServiceAccount", profile["serving"]["service_account"])


def test_the_reconciler_may_write_the_kinds_that_it_deploys_and_no_more(resources: list[dict[str, Any]]) -> None:
    (rule,) = named(resources, "Role", "espalier-reconciler")["rules"]
    assert rule["apiGroups"] == ["serving.kserve.io"]
    assert rule["resources"] == [f"{kind.value.lower()}s" for kind in Kind]
    assert set(rule["verbs"]) == {"get", "create", "patch"}


def test_the_component_lets_mlflow_wake_the_reconciler(tmp_path: Path) -> None:
    copy = shutil.copytree(DEPLOY, tmp_path / "deploy")
    for folder in (copy / "platform", copy / "reconciler"):
        file = folder / "kustomization.yaml"
        file.write_text(file.read_text().replace("# components: [../webhook]", "components: [../webhook]"))
    resources = [*built(copy), *built(copy / "reconciler")]
    for one in resources:
        kubernetes_validate.validate(one, "1.32", strict=True)
    mlflow, reconciler = (
        named(resources, "Deployment", name)["spec"]["template"]["spec"]["containers"][0]
        for name in ("mlflow", "espalier-reconciler")
    )
    assert {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS"} <= {
        one["name"] for one in mlflow["env"]
    }
    keys = [one["valueFrom"]["secretKeyRef"] for one in (mlflow["env"][-1], reconciler["env"][-1])]
    assert {key["name"] for key in keys} == {"espalier-webhook"} <= NOT_IN_THE_REPOSITORY
    assert len({key["key"] for key in keys}) == 2
    (service,) = [
        one for one in resources if one["kind"] == "Service" and one["metadata"]["name"] == "espalier-reconciler"
    ]
    (port,) = (one["port"] for one in service["spec"]["ports"])
    assert reconciler["args"][-1] == f"--webhook=0.0.0.0:{port}"
    assert reconciler["ports"] == [{"name": "webhook", "containerPort": port}]
