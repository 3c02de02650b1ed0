"""The environment variables that name the services and the keys: ESPALIER_*, MLFLOW_* and KF_PIPELINES_*.

Build an object each time a variable is needed, because the embedded services set them while the process runs. An empty variable
counts as one that is not set. boto3 reads the AWS_* variables itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Json, NonNegativeInt, PositiveInt, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class StoreSettings(BaseSettings):
    """The store (ESPALIER_*)."""

    model_config = SettingsConfigDict(env_prefix="ESPALIER_", env_ignore_empty=True, extra="ignore")

    bucket: str | None = None
    """The bucket, or bucket/prefix, that the stages share; `s3://` in front is allowed."""
    commit: str | None = None
    """The commit of the code in an image."""
    scratch: str | None = None
    """The folder for a stage's temporary files; the system's own if not set."""


class ProcessSettings(BaseSettings):
    """The processes that share a training (ESPALIER_*). They change no result but its rounding, so they are no part of a recipe or a key."""

    model_config = SettingsConfigDict(env_prefix="ESPALIER_", env_ignore_empty=True, extra="ignore")

    processes: PositiveInt | None = None
    """How many; one for each GPU if not set, and one on a machine without a GPU."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """ddp: every process holds the whole model; fsdp: each holds a part of the weights, gradients, optimizer and teacher; auto: ddp if they
    take less than half of a GPU or the optimizer is adamw-8bit, else fsdp; none: one process."""

    @property
    def count(self) -> int:
        """How many processes a machine starts for a training; 1 if the stage's own does the work."""
        if self.parallel == "none":
            return 1
        if self.processes:
            return self.processes
        import torch

        return max(1, torch.cuda.device_count())


class NodeSettings(BaseSettings):
    """The machines that share a training: the variables that torchrun reads and a TrainJob's torch runtime sets (PET_*)."""

    model_config = SettingsConfigDict(env_prefix="PET_", env_ignore_empty=True, extra="ignore")

    nnodes: PositiveInt = 1
    """How many."""
    node_rank: NonNegativeInt = 0
    """The number of this one, counted from 0."""
    master_addr: str = "localhost"
    """The first one's address."""
    master_port: int = 29500
    """The first one's port, at which all meet."""


class TrainJobSettings(BaseSettings):
    """The TrainJob that a stage on several nodes starts (ESPALIER_*)."""

    model_config = SettingsConfigDict(env_prefix="ESPALIER_", env_ignore_empty=True, extra="ignore")

    trainjob: Json[dict[str, Any]] | None = None
    """Its manifest without a name and arguments, as `espalier compile` writes it; none if the stage runs in its own pod."""


class SigningSettings(BaseSettings):
    """The signature of checkpoints (ESPALIER_SIGNING_*). Keys and certificates are files in PEM form."""

    model_config = SettingsConfigDict(env_prefix="ESPALIER_SIGNING_", env_ignore_empty=True, extra="ignore")

    method: Literal["key", "pki", "keyless"] | None = None
    """key: an elliptic-curve key; pki: a certificate; keyless: a short-lived certificate of Sigstore."""
    key: Path | None = None
    """The private key (key, pki)."""
    password: SecretStr | None = None
    """Of the private key, if it is encrypted (key)."""
    public_key: Path | None = None
    """The key that a signature is verified with (key)."""
    certificate: Path | None = None
    """The signer's certificate (pki)."""
    chain: Path | None = None
    """The certificates up to the root (pki), which a signature is verified with too."""
    identity: str | None = None
    """The signer's identity, such as https://github.com/org/repository/.github/workflows/run.yaml@refs/heads/main (keyless)."""
    issuer: str | None = None
    """The OpenID Connect issuer of that identity (keyless)."""
    sign: bool = False
    """Whether this process signs by Sigstore with the identity of its workload (keyless)."""
    token_file: Path | None = None
    """The OpenID Connect token of that identity, for the audience sigstore, such as a projected token of a service account
    (keyless). If it is not set, the token is asked of the CI system or cloud that the process runs in."""


class WebhookSettings(BaseSettings):
    """The events of MLflow's registry (ESPALIER_WEBHOOK_*)."""

    model_config = SettingsConfigDict(env_prefix="ESPALIER_WEBHOOK_", env_ignore_empty=True, extra="ignore")

    secret: SecretStr | None = None
    """The secret that MLflow signs its events with: the one that its webhook was created with."""


class VllmSettings(BaseSettings):
    """vLLM (ESPALIER_VLLM_*)."""

    model_config = SettingsConfigDict(env_prefix="ESPALIER_VLLM_", env_ignore_empty=True, extra="ignore")

    python: str | None = None
    """The interpreter of an environment that has vLLM."""


class MlflowSettings(BaseSettings):
    """MLflow (MLFLOW_*). The Kubeflow server's MLflow plugin sets `experiment_id` and `run_id` in each task."""

    model_config = SettingsConfigDict(env_prefix="MLFLOW_", env_ignore_empty=True, extra="ignore")

    tracking_uri: str | None = None
    experiment_name: str = "espalier"
    experiment_id: str | None = None
    run_id: str | None = None


class KubeflowSettings(BaseSettings):
    """Kubeflow Pipelines (KF_PIPELINES_*); a cluster profile's own fields take precedence."""

    model_config = SettingsConfigDict(env_prefix="KF_PIPELINES_", env_ignore_empty=True, extra="ignore")

    endpoint: str | None = None
    ui_endpoint: str | None = None
    """The address for a browser, if it differs from the endpoint."""
    token: str | None = None
