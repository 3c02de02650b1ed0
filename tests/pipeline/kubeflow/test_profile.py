"""A profile is checked whole before anything is sent, and says what each stage is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.lib.errors import Refusal
from pipeline.kubeflow.profile import PROFILES, Needs, Profile, Retries, stage_names, variables

SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))
LEAST = {"environment": {"ESPALIER_BUCKET": "espalier"}}


def load(tmp_path: Path, **fields: object) -> Profile:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(LEAST | fields))
    return Profile.load(str(path))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_is_valid_and_explains_itself(name: str) -> None:
    profile = Profile.load(name)
    assert profile.needs("regularize").retries
    assert (PROFILES / f"{name}.yaml").read_text().count("#") > 10


def test_three_profiles_are_shipped() -> None:
    assert SHIPPED == ["aws-irsa", "nvidia", "plain"]


def test_only_the_nvidia_and_aws_profiles_ask_for_gpus_and_only_where_something_computes() -> None:
    for name, computing in {
        "plain": set(),
        "nvidia": (compute := {"learn_gates", "regularize", "control", "lora_rft", "prune", "promote", "evaluate"}),
        "aws-irsa": compute,
    }.items():
        profile = Profile.load(name)
        assert {stage for stage in stage_names() if profile.needs(stage).gpu} == computing


def test_the_aws_profile_has_no_key_for_s3() -> None:
    variables_of_secrets = {variable for secret in Profile.load("aws-irsa").secrets for variable in secret.keys}
    assert not any(name.startswith("AWS_") for name in variables_of_secrets)


def test_a_stage_gets_the_defaults_with_its_own_fields_in_their_places(tmp_path: Path) -> None:
    profile = load(
        tmp_path,
        defaults={"cpu": 1, "memory": "4Gi", "retries": {"times": 2}},
        stages={"prune": {"memory": "32Gi", "retries": None}},
    )
    assert profile.needs("prune") == Needs(cpu="1", memory="32Gi", retries=None)
    assert profile.needs("pin") == Needs(cpu="1", memory="4Gi", retries=Retries(times=2))


def test_a_retrys_window_holds_every_try_and_every_wait() -> None:
    # Argo counts the work into the window, so that a window of an hour would end a training of two.
    assert Retries(times=2, wait=60, factor=2).window(timeout=7200) == 3 * 7200 + 60 + 120


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"environmnt": {}}, "'environmnt' is not known: did you mean 'environment'?"),
        ({"stages": {"prune": {"memroy": "1Gi"}}}, "'stages.prune.memroy' is not known: did you mean 'memory'?"),
        ({"stages": {"regularise": {}}}, "there is no stage 'regularise': did you mean 'regularize'?"),
        ({"defaults": {"memory": "12 GB"}}, "'defaults.memory' is '12 GB'"),
        ({"defaults": {"gpu": {"count": 0}}}, "'defaults.gpu.count' is 0"),
        ({"environment": {"MLFLOW_TRACKING_URI": "http://m"}}, "ESPALIER_BUCKET is missing"),
        ({"secrets": [{"name": "s"}]}, "the secret s has neither 'keys' nor 'mount'"),
        ({"secrets": [{"name": "s", "mount": "keys"}]}, "'secrets.0.mount' is 'keys'"),
        (
            {"secrets": [{"name": "s", "mount": "/k", "stages": ["registr"]}]},
            "there is no stage 'registr': did you mean 'register'?",
        ),
        (
            {"environment": {"ESPALIER_BUCKET": "b", "AWS_SECRET_ACCESS_KEY": "x"}},
            "AWS_SECRET_ACCESS_KEY is a secret: put it into a Kubernetes Secret",
        ),
        (
            {"environment": {"ESPALIER_BUCKET": "b", "MLFLOW_TRACKING_URI": "http://me:pass@mlflow"}},
            "MLFLOW_TRACKING_URI is a secret",
        ),
    ],
)
def test_a_wrong_field_is_refused_in_a_sentence(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    with pytest.raises(Refusal) as refused:
        load(tmp_path, **fields)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_profile_that_is_not_there_is_refused_with_the_shipped_names() -> None:
    with pytest.raises(Refusal, match=r"the profile nvdia cannot be read .*\(aws-irsa, nvidia, plain\)"):
        Profile.load("nvdia")


@pytest.mark.parametrize("image", ["espalier", "registry.example.org/espalier:1.0", "espalier@sha256:abc"])
def test_an_image_without_a_digest_is_refused_unless_it_is_allowed(image: str) -> None:
    profile = Profile.load("plain", image)
    with pytest.raises(Refusal, match="has no digest"):
        profile.pinned_image()
    assert profile.pinned_image(mutable=True) == image


def test_no_image_is_refused() -> None:
    with pytest.raises(Refusal, match="'image' is missing"):
        Profile.load("plain").pinned_image(mutable=True)


def test_this_machine_uses_the_profiles_bucket_and_its_own_way_to_it() -> None:
    profile = Profile.load("plain")
    own = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000", "ESPALIER_BUCKET": "another"}
    assert variables(profile, own) == {"ESPALIER_BUCKET": "espalier", "AWS_DEFAULT_REGION": "us-east-1"}
    assert variables(profile, {})["AWS_ENDPOINT_URL_S3"] == profile.environment["AWS_ENDPOINT_URL_S3"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"stages": {"evaluate": {"nodes": 2}}},
            "evaluate.nodes is 2, and only control, lora_rft, regularize use several",
        ),
        ({"defaults": {"nodes": 2}}, "nodes is 2, and not every stage uses several"),
        ({"trainer": {"runtme": "torch"}}, "'trainer.runtme' is not known: did you mean 'runtime'"),
    ],
)
def test_several_nodes_are_for_the_stages_that_train(fields: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=said):
        load(tmp_path, **fields)
