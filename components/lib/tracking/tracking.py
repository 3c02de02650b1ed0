"""MLflow: a parent run a recompression, a nested run a stage, a model version a result.

Only ids are used, never MLflow's notion of an active run, so that nothing depends on what else runs in the process.
"""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.lib.errors import Refusal, Unavailable
from components.lib.store.store import Reference

if TYPE_CHECKING:
    from components.lib.stage.run import Stage

log = logging.getLogger(__name__)

# MLflow's own default goes on asking a server that fails for some minutes, at every call.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

LABEL = "espalier.run"
"""The tag of a parent run that holds its label."""

STAGE_OF = "espalier.stage_of"
"""The tag of a stage's run that holds the label of the recompression it is a part of."""

ITEM = "espalier.item"
"""With an item's key it is the tag of the version made for that item: one version may be the answer to several."""

SHOWN = {".json", ".jsonl", ".svg", ".html", ".md"}
"""Files of a stage's output that are also kept as artifacts of its MLflow run; checkpoints stay in the store alone."""

FLUSH_SECONDS = 5.0
LONGEST_PAUSE = 300.0
"""Seconds between two attempts to send numbers to a server that is away: each attempt holds the training up."""
PROGRESS_SECONDS = 0.3


_ABSENT = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
"""What the registry answers where there is no such model or version, and where a model has no such alias."""


def client() -> MlflowClient:
    """The client of the server that MLFLOW_TRACKING_URI names.

    Raises:
        Refusal: the variable is not set; MLflow would quietly write to a local file.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        raise Unavailable(
            "MLFLOW_TRACKING_URI is not set: start the embedded services (espalier services up) or name your server"
        )
    return _client(address)


_client = cache(MlflowClient)


def check() -> None:
    """Make sure, within seconds, that the tracking server answers.

    Raises:
        Refusal: it does not.
    """
    address = client().tracking_uri
    if not address.startswith("http"):
        return
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=5):
            pass
    except urllib.error.HTTPError as error:
        if error.code in {401, 403}:
            cure = "set MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_USERNAME, or have the server allow this host"
            raise Unavailable(f"MLflow at {address} refuses this client ({error.code}): {cure}") from None
    except OSError as error:
        raise Unavailable(
            f"MLflow at {address} does not answer ({error}): start it, or correct MLFLOW_TRACKING_URI"
        ) from None


def experiment_id() -> str:
    """The experiment MLFLOW_EXPERIMENT_NAME names (default `espalier`), made where it is missing.

    The Kubeflow server's MLflow plugin names its own in MLFLOW_EXPERIMENT_ID: the runs that it makes lie there.
    """
    if os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return os.environ["MLFLOW_EXPERIMENT_ID"]
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "espalier")
    found = client().get_experiment_by_name(name)
    if found:
        return found.experiment_id
    try:
        return client().create_experiment(name)
    except MlflowException:
        # Another stage made it in between.
        made = client().get_experiment_by_name(name)
        if made is None:
            raise
        return made.experiment_id


def find_parent(label: str) -> Run | None:
    """The parent run of the recompression called `label`, or None."""
    found = client().search_runs([experiment_id()], filter_string=f"tags.`{LABEL}` = '{label}'", max_results=1)
    return found[0] if found else None


def open_parent(label: str, tags: Mapping[str, str], recipe: Mapping[str, Any]) -> str:
    """Return the parent run's id, making the run where it is missing, with its tags and the recipe as params.

    The Kubeflow server's MLflow plugin makes a parent run of its own and names the task's run in MLFLOW_RUN_ID: then that
    parent is the one, unless it is another recompression's already: a watcher's run has several.
    """
    found = find_parent(label)
    run_id = found.info.run_id if found else _plugin_parent(label)
    if run_id is None:
        run_id = client().create_run(experiment_id(), run_name=label).info.run_id
    texts = {LABEL: label, **tags}
    _log(run_id, texts, recipe)
    return run_id


def close_parent(label: str, succeeded: bool) -> None:
    """End the parent run, and any stage's run under it that was killed before it could end itself."""
    parent = find_parent(label)
    if parent is None:
        return
    for run in _stage_runs(label):
        if run.info.status == "RUNNING":
            client().set_terminated(run.info.run_id, "FAILED")
    client().set_terminated(parent.info.run_id, "FINISHED" if succeeded else "FAILED")


class StageJournal:
    """A stage's words, to its MLflow run, to `metrics.jsonl` and to whoever follows the run.

    A number that MLflow did not take is kept and sent again later: a server that is away for a while costs a training
    nothing, and `metrics.jsonl`, which the report is drawn from, is always whole.
    """

    def __init__(self, stage: Stage, run_id: str, out: Path) -> None:
        self.run_id = run_id
        self._stage = stage
        self._file = out / "metrics.jsonl"
        self._waiting: list[Metric] = []
        self._pause = FLUSH_SECONDS
        self._flushed = self._told = time.monotonic()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, such as `loss` at an optimizer step."""
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self._flushed > self._pause:
            self.flush()

    def flush(self) -> None:
        """Send what waits to MLflow; what it does not take goes on waiting."""
        try:
            while self._waiting:
                client().log_batch(self.run_id, metrics=self._waiting[:1000])
                del self._waiting[:1000]
            self._pause = FLUSH_SECONDS
        except Exception as error:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            log.warning("MLflow took no metrics (%s); %d wait", error, len(self._waiting))
        self._flushed = time.monotonic()

    def progress(self, done: int, total: int, **shown: float) -> None:
        """Tell the follower, a few times a second at most; the last part is always told."""
        if done < total and time.monotonic() - self._told < PROGRESS_SECONDS:
            return
        self._told = time.monotonic()
        self._stage.tell("progress", done=done, total=total, shown=shown)

    def leave(self, out: Path, reference: str, seconds: float) -> None:
        """Keep the small files of the output as artifacts of the run, and its reference as a tag.

        The output is whole in the store by now: a server that does not take a copy of it is no reason to fail the stage.
        """
        try:
            client().set_tag(self.run_id, "espalier.output", reference)
            client().log_metric(self.run_id, "seconds", seconds)
            for path in sorted(out.iterdir()):
                if path.suffix in SHOWN:
                    client().log_artifact(self.run_id, str(path))
        except Exception as error:
            log.warning("MLflow took no copy of the stage's files (%s); they are at %s", error, reference)


@contextmanager
def stage_run(stage: Stage, out: Path) -> Iterator[StageJournal]:
    """Open the stage's nested run, and end it with the state its work ended in."""
    run_id = os.environ.get("MLFLOW_RUN_ID") or _nested(stage)
    _log(run_id, stage_tags(stage), stage.settings)
    try:
        yield StageJournal(stage, run_id, out)
    except BaseException:
        _end(run_id, "FAILED")
        raise
    _end(run_id, "FINISHED")


def _end(run_id: str, state: str) -> None:
    """End a stage's run as well as can be: neither a finished output nor what went wrong may be lost to a server that is away."""
    try:
        client().set_terminated(run_id, state)
    except Exception as error:
        log.warning("MLflow was not told that the run %s is %s (%s)", run_id, state, error)


def stage_tags(stage: Stage) -> dict[str, str]:
    """What names a stage's run: the stage, its key, its code and its inputs."""
    inputs = {f"espalier.input.{name}": str(reference) for name, reference in stage.inputs.items()}
    return {
        STAGE_OF: stage.run,
        "espalier.stage": stage.name,
        "espalier.variant": stage.variant,
        "espalier.key": stage.key,
        "espalier.code": stage.code,
        **inputs,
    }


def record_reused(label: str, manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Make a nested run for each stage whose output was found made, pointing at the run that made it.

    Args:
        label: the run's label.
        manifests: each stage output's manifest metadata, by the name to show.
    """
    parent = find_parent(label)
    if parent is None:
        return
    have = {run.data.tags.get("espalier.key") for run in _stage_runs(label)}
    for name, made in manifests.items():
        if made.get("key") in have:
            continue
        tags = {
            "mlflow.parentRunId": parent.info.run_id,
            STAGE_OF: label,
            "espalier.stage": made["stage"],
            "espalier.key": made["key"],
            "espalier.code": made["code"],
            "espalier.reused_from": made["mlflow_run_id"],
        }
        run = client().create_run(experiment_id(), run_name=f"{name} (reused)", tags=tags)
        client().set_terminated(run.info.run_id, "FINISHED")


@dataclass(frozen=True)
class Version:
    """A registered model version that Espalier made."""

    name: str
    version: str
    source: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @property
    def reference(self) -> Reference:
        """The artifact that holds the version's checkpoint."""
        text = self.tags.get("espalier.reference")
        if not text:
            raise Refusal(
                f"version {self.version} of {self.name} has no tag espalier.reference: it was not registered by espalier"
            )
        return Reference.parse(text)


def aliased(name: str, alias: str) -> Version | None:
    """The version that the alias names, or None where there is none: a server that does not answer is another matter."""
    try:
        found = client().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in _ABSENT:
            return None
        raise
    return version_of(found.name, str(found.version))


def version_of(name: str, version: str) -> Version:
    """The version with its aliases.

    Raises:
        Refusal: there is none.
    """
    try:
        found = client().get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        raise Refusal(f"the registry has no version {version} of {name}: {_versions_known(name)}") from None
    return _version(found)


def register_version(name: str, reference: Reference, run_id: str, tags: Mapping[str, str]) -> Version:
    """Register the checkpoint under `name`, or find the version that holds it already; its evidence is brought up to date.

    A version is identified by its checkpoint's digest: the same files are the same version, however often they are registered.
    """
    source = f"{reference.uri}/model"
    try:
        client().create_registered_model(name)
    except MlflowException:
        log.debug("the model %s is registered already", name)
    evidence = {**tags, "espalier.reference": str(reference), "espalier.digest": reference.digest}
    made = None
    if not _holding(name, reference.digest):
        made = client().create_model_version(name, source, run_id=run_id, tags=evidence)
    # Two runs may have looked before either had made its version: both find the older one now, and the younger goes.
    oldest = _holding(name, reference.digest)[0]
    if made is not None and str(made.version) != oldest.version:
        client().delete_model_version(name, str(made.version))
    tag_version(oldest, evidence)
    return version_of(name, oldest.version)


def _holding(name: str, digest: str) -> list[Version]:
    """The versions of `name` that hold the checkpoint with this digest, oldest first."""
    found = (_version(one) for one in client().search_model_versions(f"name = '{name}'"))
    return sorted((one for one in found if one.tags.get("espalier.digest") == digest), key=lambda one: int(one.version))


def made_for(name: str, key: str) -> Version | None:
    """The version of `name` that was made for the watched item with this key, or None."""
    found = client().search_model_versions(f"name = '{name}' and tags.`{ITEM}.{key}` = 'made'")
    return _version(found[0]) if found else None


def tag_version(version: Version, tags: Mapping[str, str]) -> None:
    """Set tags of a registered version."""
    for key, value in tags.items():
        client().set_model_version_tag(version.name, version.version, key, value)


def leave_report(label: str, files: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    """Keep the report's files and summary numbers in the parent run."""
    parent = find_parent(label)
    if parent is None:
        return
    for name, text in files.items():
        client().log_text(parent.info.run_id, text, name)
    now = int(time.time() * 1000)
    client().log_batch(parent.info.run_id, metrics=[Metric(name, value, now, 0) for name, value in metrics.items()])


def set_alias(name: str, alias: str, version: str) -> None:
    """Point the alias at the version. A version that has it already is left alone, since webhooks would fire again."""
    present = aliased(name, alias)
    if present is None or present.version != version:
        client().set_registered_model_alias(name, alias, version)


def drop_alias(name: str, alias: str, version: str) -> None:
    """Take the alias away where it names this version."""
    present = aliased(name, alias)
    if present and present.version == version:
        client().delete_registered_model_alias(name, alias)


def log_model_evidence(
    name: str, run_id: str, tags: Mapping[str, str], measured: Mapping[str, tuple[float, str, str]]
) -> str:
    """Make a LoggedModel that ties each number to the data set it was measured on, and return its id.

    Args:
        name: the registered model's name.
        run_id: the run that measured.
        tags: tags of the LoggedModel.
        measured: metric name → (value, data set's name, data set's digest).
    """
    model = client().create_logged_model(
        experiment_id(), name=name, source_run_id=run_id, tags=dict(tags), model_type="transformers-checkpoint"
    )
    for metric, (value, dataset, digest) in measured.items():
        client().log_metric(
            run_id, metric, value, model_id=model.model_id, dataset_name=dataset, dataset_digest=digest[:32]
        )
    client().finalize_logged_model(model.model_id, "READY")
    return model.model_id


def _version(found: ModelVersion) -> Version:
    return Version(found.name, str(found.version), found.source, tuple(sorted(found.aliases)), dict(found.tags))


def _versions_known(name: str) -> str:
    versions = sorted(int(found.version) for found in client().search_model_versions(f"name = '{name}'"))
    return f"it has {', '.join(map(str, versions))}" if versions else "no model is registered under that name"


def _nested(stage: Stage) -> str:
    parent = find_parent(stage.run)
    tags = {"mlflow.parentRunId": parent.info.run_id} if parent else {}
    name = f"{stage.name} {stage.variant}".strip()
    return client().create_run(experiment_id(), run_name=name, tags=tags).info.run_id


def _plugin_parent(label: str) -> str | None:
    """The parent of the run that the Kubeflow server's plugin made for this task, where it is free to be `label`'s."""
    own = os.environ.get("MLFLOW_RUN_ID")
    if not own:
        return None
    parent = client().get_run(own).data.tags.get("mlflow.parentRunId", own)
    taken = client().get_run(parent).data.tags.get(LABEL, label) != label
    return None if taken else parent


def _stage_runs(label: str) -> list[Run]:
    """The runs of the recompression's stages, whoever made them."""
    return list(client().search_runs([experiment_id()], filter_string=f"tags.`{STAGE_OF}` = '{label}'"))


def _log(run_id: str, tags: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Log tags and params, at most the hundred params a call that MLflow takes."""
    params = _params(settings)
    client().log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()], params=params[:100])
    for start in range(100, len(params), 100):
        client().log_batch(run_id, params=params[start : start + 100])


def _params(settings: Mapping[str, Any], prefix: str = "") -> list[Param]:
    """Flatten nested settings into dotted params; MLflow keeps at most 6000 characters of a value."""
    params: list[Param] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            params += _params(value, f"{prefix}{name}.")
        elif value is not None:
            params.append(Param(f"{prefix}{name}", str(value)[:6000]))
    return params
