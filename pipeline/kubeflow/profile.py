"""Cluster profiles: the image, resources, secrets and placement of the stages, applied to every task of a pipeline.

    profile = Profile.load("nvidia", image="registry.example/espalier@sha256:…")
    profile.configure(task)

A profile is a YAML file; the shipped ones in `pipeline/profiles` are commented and ready to copy. It names secrets and holds none.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from kfp import kubernetes
from kfp.dsl import PipelineTask
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from components.lib.errors import Refusal
from components.lib.given_yaml import read_yaml, short
from components.lib.stage.declaration import declared_stages
from pipeline.kubeflow.trainjob import train_job

PROFILES = Path(__file__).parents[1] / "profiles"
COMPONENTS = Path(__file__).parents[2] / "components"

SCRATCH = "/scratch"
"""The folder for temporary files in the image: the value of ESPALIER_SCRATCH there."""

LONGEST = 7 * 24 * 3600
"""Seconds assumed as the longest try of a stage if the profile sets no timeout for it."""

_SECRET = re.compile(r"(SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIALS)(_ID|_KEY)?$")
_PINNED = re.compile(r"^\S+@sha256:[0-9a-f]{64}$")
_DERIVED = {"model", "served-model-name", "load-format"}
"""Options of vLLM that a manifest writes itself."""

Cpu = Annotated[str, BeforeValidator(str), Field(pattern=r"^([0-9]*\.)?[0-9]+m?$")]
Bytes = Annotated[str, BeforeValidator(str), Field(pattern=r"^[0-9]+([EPTGMK]i?)?$")]
Seconds = Annotated[int, Field(ge=1)]


class ProfileSection(BaseModel):
    """A part of the profile: immutable, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Gpu(ProfileSection):
    """The accelerators of one task."""

    type: str = "nvidia.com/gpu"
    """The resource that the device plugin advertises."""
    count: Annotated[int, Field(ge=1)] = 1


class Toleration(ProfileSection):
    """A taint that the task's pod tolerates."""

    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Retries(ProfileSection):
    """How often, and after how many seconds, a failed task is retried; each wait is `factor` times the last."""

    times: Annotated[int, Field(ge=1)]
    wait: Seconds = 60
    factor: Annotated[float, Field(ge=1)] = 2.0

    def window(self, timeout: int) -> int:
        """Return the seconds from the first start to the end of the last try, if each try takes `timeout` seconds.

        Argo counts the tries as well as the waits, and kfp's default is an hour: a stage that trains for two would be killed after one.
        """
        waits = sum(self.wait * self.factor**number for number in range(self.times))
        return round((self.times + 1) * timeout + waits)


class Secret(ProfileSection):
    """A Kubernetes Secret by its name: the key of it for each environment variable, or the folder for its keys as files."""

    name: str
    keys: dict[str, str] = {}
    mount: Annotated[str, Field(pattern=r"^/")] | None = None
    """The folder."""
    stages: list[str] = []
    """The stages that get it; all if empty."""
    optional: bool = False

    @model_validator(mode="after")
    def _reaches_a_stage(self) -> Secret:
        if not self.keys and not self.mount:
            raise ValueError(f"the secret {self.name} has neither 'keys' nor 'mount', so no stage gets it: add one")
        _check_stages(self.stages)
        return self


class Needs(ProfileSection):
    """The resources, placement and retries of one stage."""

    cpu: Cpu | None = None
    """Requested, without a limit: throttling a stage has no use."""
    memory: Bytes | None = None
    """Requested and limited."""
    gpu: Gpu | None = None
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    shared_memory: Bytes | None = None
    """The size of /dev/shm, by default 64 MB on Kubernetes; its content counts as memory of the task."""
    scratch: Bytes | None = None
    """The size limit of the scratch folder: allow twice the release and the checkpoints of its training."""
    timeout: Seconds | None = None
    retries: Retries | None = None
    nodes: Annotated[int, Field(ge=1)] = 1
    """How many machines share a training; each gets the fields above."""


class Trainer(ProfileSection):
    """Kubeflow Trainer, which runs the stages on several nodes."""

    runtime: str = "torch-distributed"
    """The training runtime; one with the torch policy."""
    kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    queue: str | None = None
    """Kueue's local queue; none if absent."""


class Server(ProfileSection):
    """The Kubeflow Pipelines server. KF_PIPELINES_ENDPOINT and KF_PIPELINES_UI_ENDPOINT replace an absent host and ui."""

    host: str | None = None
    ui: str | None = None
    """The address for a browser, if it differs from the host."""
    namespace: str | None = None
    """The user's namespace in a multi-user installation; absent in a single-user one."""
    experiment: str = "espalier"


class Serving(ProfileSection):
    """The server of a promoted model: what its manifest asks of the cluster."""

    namespace: str | None = None
    """The namespace of the manifest; that of `kubectl` if absent."""
    service_account: str | None = None
    """The account whose Secret or role lets the server read the bucket; the namespace's default if absent."""
    replicas: Annotated[int, Field(ge=0)] = 1
    cpu: Cpu = "4"
    """Requested, without a limit."""
    memory: Bytes = "16Gi"
    """Requested and limited."""
    gpu: Gpu | None = None
    image: str | None = None
    """The image of vLLM with its digest: for `--format compose`, which has no runtime that knows one."""
    vllm: dict[str, bool | int | float | str] = {}
    """Further options of vLLM by name, such as `max-model-len: 4096`; true is an option without a value."""

    @field_validator("image")
    @classmethod
    def _fixed(cls, value: str | None) -> str | None:
        if value is not None and not _PINNED.match(value):
            raise ValueError(f"the image {value!r} has no digest: name it as registry/vllm@sha256:…")
        return value

    @field_validator("vllm")
    @classmethod
    def _written_here(cls, value: dict[str, bool | int | float | str]) -> dict[str, bool | int | float | str]:
        for name in value:
            if name.replace("_", "-") in _DERIVED:
                raise ValueError(f"{name} is derived from the version that is served: leave it out")
        return value


class Profile(ProfileSection):
    """A cluster's settings for the pipeline."""

    image: str | None = None
    """The stages' image with its digest; `--image` or ESPALIER_IMAGE takes precedence."""
    image_pull_secrets: list[str] = []
    kubeflow: Server = Server()
    service_account: str | None = None
    """The account that the stages run as; the installation's default if absent."""
    pipeline_root: str | None = None
    """The location of Kubeflow's small artifacts; the installation's default if absent."""
    environment: dict[str, str]
    """Variables of every stage: ESPALIER_BUCKET at least."""
    secrets: list[Secret] = []
    defaults: Needs = Needs()
    stages: dict[str, Needs] = {}
    """The fields that differ from `defaults`, by stage."""
    trainer: Trainer = Trainer()
    serving: Serving = Serving()
    """The server of the promoted model (docs/serving.md)."""

    @field_validator("environment")
    @classmethod
    def _open(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if _SECRET.search(name) or re.search(r"://[^/\s]*:[^/\s]*@", text):
                raise ValueError(f"{name} is a secret: put it into a Kubernetes Secret and name that in 'secrets'")
        if not value.get("ESPALIER_BUCKET"):
            raise ValueError("ESPALIER_BUCKET is missing: name the bucket, or bucket/prefix, that the stages share")
        return value

    @field_validator("stages")
    @classmethod
    def _known(cls, value: dict[str, Needs]) -> dict[str, Needs]:
        _check_stages(value)
        several = [name for name, stage in declared_stages().items() if stage.shared]
        for name, needs in value.items():
            if needs.nodes > 1 and name not in several:
                raise ValueError(
                    f"{name}.nodes is {needs.nodes}, and only {', '.join(several)} use several: leave it out"
                )
        return value

    @field_validator("defaults")
    @classmethod
    def _on_one_node(cls, value: Needs) -> Needs:
        if value.nodes > 1:
            raise ValueError(f"nodes is {value.nodes}, and not every stage uses several: set it for single stages")
        return value

    @classmethod
    def load(cls, name: str, image: str | None = None) -> Profile:
        """Read a profile's file, or the shipped profile of that name, and replace its image if one is given.

        Raises:
            Refusal: there is none, or a field is wrong.
        """
        path = find_profile(name)
        try:
            settings = read_yaml(path)
        except OSError as error:
            shipped = ", ".join(sorted(path.stem for path in PROFILES.glob("*.yaml")))
            raise Refusal(
                f"the profile {name} cannot be read ({error.strerror}): name a YAML file or a shipped profile ({shipped})"
            ) from None
        except ValueError as error:
            raise Refusal(f"the profile {path} is not YAML ({error}): correct it") from None
        if not isinstance(settings, dict):
            raise Refusal(f"the profile {path} holds no fields: copy a shipped one from {PROFILES}")
        try:
            return cls.model_validate({**settings, **({"image": image} if image else {})})
        except ValidationError as error:
            raise Refusal(_sentence(path, error)) from None

    def needs(self, stage: str) -> Needs:
        """Return the defaults with the stage's own fields in their places."""
        own = self.stages.get(stage, Needs())
        return Needs.model_validate(self.defaults.model_dump(exclude_unset=True) | own.model_dump(exclude_unset=True))

    def parallel(self) -> str:
        """Return the value of ESPALIER_PARALLEL in the stages."""
        return self.environment.get("ESPALIER_PARALLEL") or "auto"

    def processes(self, stage: str) -> int:
        """Return how many processes share a training, on all its nodes: one for each GPU unless ESPALIER_PROCESSES says otherwise."""
        needs = self.needs(stage)
        asked = self.environment.get("ESPALIER_PROCESSES") or (needs.gpu.count if needs.gpu else 1)
        return int(asked) * needs.nodes if self.parallel() != "none" else 1

    def pinned_image(self, mutable: bool = False) -> str:
        """Return the image, which must have a digest.

        Args:
            mutable: accept a tag too, although it may later name other code than the pipeline was compiled for.

        Raises:
            Refusal: the profile names no image, or names it by a tag and `mutable` is False.
        """
        if not self.image:
            raise Refusal("the profile's field 'image' is missing: name one with --image registry/espalier@sha256:…")
        if not mutable and not _PINNED.match(self.image):
            raise Refusal(
                f"the image {self.image!r} has no digest, so the code that runs could change: name it as registry/espalier@sha256:…, "
                "or allow it with --mutable-image"
            )
        return self.image

    def configure(self, task: PipelineTask) -> None:
        """Give a task of a pipeline the needs of its stage. `configured_for_cluster` sets the image."""
        stage = task.component_spec.name.replace("-", "_")
        needs = self.needs(stage)
        if needs.nodes > 1:
            task.set_env_variable("ESPALIER_TRAINJOB", json.dumps(train_job(self, stage), sort_keys=True))
            # The task itself only waits.
            needs = self.defaults.model_copy(update={"gpu": None, "timeout": needs.timeout, "retries": needs.retries})
        # Finished outputs are found in the store by their keys; Kubeflow's cache knows neither code nor content.
        task.set_caching_options(False)
        for variable, value in self.environment.items():
            task.set_env_variable(variable, value)
        for secret in self.secrets:
            if stage in (secret.stages or [stage]):
                _hand(task, secret)
        if self.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, self.image_pull_secrets)
        _resources(task, needs)
        _placement(task, needs)
        _patience(task, needs)


def _hand(task: PipelineTask, secret: Secret) -> None:
    if secret.keys:
        keys = {key: variable for variable, key in secret.keys.items()}
        kubernetes.use_secret_as_env(task, secret.name, keys, optional=secret.optional)
    if secret.mount:
        kubernetes.use_secret_as_volume(task, secret.name, secret.mount, optional=secret.optional)


def _resources(task: PipelineTask, needs: Needs) -> None:
    if needs.cpu:
        task.set_cpu_request(needs.cpu)
    if needs.memory:
        task.set_memory_request(needs.memory).set_memory_limit(needs.memory)
    if needs.gpu:
        task.set_accelerator_type(needs.gpu.type).set_accelerator_limit(needs.gpu.count)
    if needs.shared_memory:
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=needs.shared_memory)
    if needs.scratch:
        kubernetes.empty_dir_mount(task, "scratch", SCRATCH, size_limit=needs.scratch)


def _placement(task: PipelineTask, needs: Needs) -> None:
    for label, value in needs.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in needs.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())


def _patience(task: PipelineTask, needs: Needs) -> None:
    if needs.timeout:
        kubernetes.set_timeout(task, needs.timeout)
    if needs.retries:
        task.set_retry(
            needs.retries.times,
            backoff_duration=f"{needs.retries.wait}s",
            backoff_factor=needs.retries.factor,
            backoff_max_duration=f"{needs.retries.window(needs.timeout or LONGEST)}s",
        )


def find_profile(name: str) -> Path:
    """Return the profile's file: the named file if it exists, else the shipped profile of that name."""
    shipped = PROFILES / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return shipped if not Path(name).is_file() and shipped.exists() else Path(name)


def stage_names() -> list[str]:
    """Return the names of the stages: the folders of `components` with a Kubeflow face."""
    return sorted(path.parent.name for path in COMPONENTS.glob("*/component.py"))


def _check_stages(names: Iterable[str]) -> None:
    known = stage_names()
    for name in names:
        if name not in known:
            raise ValueError(f"there is no stage {name!r}{_nearest(name, known)}")


def _sentence(path: Path, error: ValidationError) -> str:
    """Return the first fault as one sentence, with the number of the others."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    place = short(".".join(str(part) for part in fault["loc"]))
    if fault["type"] == "extra_forbidden":
        # In `stages` the name of a stage precedes the field, so compare with the fields of every section.
        known = {name for model in ProfileSection.__subclasses__() for name in model.model_fields}
        said = f"the field {place!r} is not known{_nearest(str(fault['loc'][-1]), sorted(known))}"
    elif fault["type"] == "missing":
        said = f"the field {place!r} is missing: add it"
    elif fault["type"] == "value_error":
        said = f"{place}: {fault['ctx']['error']}"
    else:
        said = f"the field {place!r} is {short(repr(fault['input']))}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"in the profile {path}, {said}{more}"


def _nearest(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {nearest[0]!r}?" if nearest else f": known are {', '.join(known)}"


def variables(profile: Profile, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the part of the profile's environment that this machine needs to find the store.

    A variable that `environment` sets already is left out, except the bucket, which is always the profile's: the stages read
    there the release and the texts that this machine uploads.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION")
    found = {name: profile.environment[name] for name in names if name in profile.environment}
    theirs = {name: value for name, value in found.items() if not environment.get(name)}
    return theirs | {"ESPALIER_BUCKET": profile.environment["ESPALIER_BUCKET"]}
