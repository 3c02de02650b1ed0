"""MLflow runs: a parent run for each recompression, a nested run for each of its stages."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from components.lib.settings import MlflowSettings
from components.lib.stage.events import EventSink
from components.lib.store.store import Reference
from components.lib.tracking.client import client, experiment_id
from components.lib.tracking.journal import StageJournal
from components.lib.tracking.origin import source_tags

log = logging.getLogger(__name__)

LABEL = "espalier.run"
"""The tag of a parent run that holds its label."""

DIGITS = 32
"""MLflow keeps at most 36 characters of a data set's digest."""

ATTEMPTS = 4
"""How often data sets are logged before an error counts."""

STAGE_OF = "espalier.stage_of"
"""The tag of a stage's run that holds the label of the recompression it is a part of."""


def find_parent(label: str) -> Run | None:
    """The parent run of the recompression called `label`, or None."""
    found = client().search_runs([experiment_id()], filter_string=f"tags.`{LABEL}` = '{label}'", max_results=1)
    return found[0] if found else None


def open_parent(label: str, tags: Mapping[str, str], recipe: Mapping[str, Any]) -> str:
    """Return the parent run's id, creating the run if it is missing, with its tags and the recipe as params.

    The Kubeflow server's MLflow plugin creates a parent run itself and names the task's run in MLFLOW_RUN_ID. That parent is then
    used, unless it belongs to another recompression already: one run of a watcher has several.
    """
    found = find_parent(label)
    run_id = found.info.run_id if found else _plugin_parent(label)
    if run_id is None:
        run_id = client().create_run(experiment_id(), run_name=label).info.run_id
    _log(run_id, {LABEL: label, **source_tags(), **tags}, recipe)
    return run_id


def log_data(run_id: str, data: Mapping[str, Reference], context: str) -> None:
    """Log data sets as inputs of a run, with their digests; one that is logged already is not logged again.

    Args:
        run_id: the run.
        data: the data sets in the store, by name.
        context: what they are used for, such as `calibration`.
    """
    inputs = [
        DatasetInput(
            Dataset(name, reference.digest[:DIGITS], "s3", json.dumps({"uri": reference.uri})),
            [InputTag("mlflow.data.context", context)],
        )
        for name, reference in data.items()
    ]
    if not inputs:
        return
    for _ in range(ATTEMPTS - 1):
        # MLflow looks a data set up and then inserts it: a run that logs the same one in the meantime makes this fail.
        with suppress(MlflowException):
            client().log_inputs(run_id, inputs)
            return
    client().log_inputs(run_id, inputs)


def close_parent(label: str, succeeded: bool) -> None:
    """End the parent run, and every stage's run that still counts as running because its process was killed."""
    parent = find_parent(label)
    if parent is None:
        return
    for run in _stage_runs(label):
        if run.info.status == "RUNNING":
            client().set_terminated(run.info.run_id, "FAILED")
    client().set_terminated(parent.info.run_id, "FINISHED" if succeeded else "FAILED")


@contextmanager
def stage_run(
    label: str,
    name: str,
    variant: str,
    tags: Mapping[str, str],
    settings: Mapping[str, Any],
    out: Path,
    sink: EventSink,
    data: Mapping[str, Reference] | None = None,
) -> Iterator[StageJournal]:
    """Open a stage's nested run, and end it with the state in which the block ends.

    The Kubeflow server's MLflow plugin names the run that it made for this task in MLFLOW_RUN_ID; that run is then used.

    Args:
        label: the recompression that the stage is a part of.
        name: the stage.
        variant: tells apart several runs of one stage in a recompression; may be empty.
        tags: the run's other tags, such as sha256.key and espalier.input.*.
        settings: logged as the run's params.
        out: the stage's output folder, in which the journal writes `metrics.jsonl`.
        sink: receives the stage's progress events.
        data: the data sets that the stage reads, by name.
    """
    run_id = MlflowSettings().run_id or _nested(label, f"{name} {variant}".strip())
    own = {STAGE_OF: label, "espalier.stage": name, "espalier.variant": variant}
    _log(run_id, {**source_tags(), **tags, **own}, settings)
    log_data(run_id, data or {}, name)
    try:
        yield StageJournal(run_id, out, sink)
    except BaseException:
        _end(run_id, "FAILED")
        raise
    _end(run_id, "FINISHED")


def record_reused(label: str, manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Create a nested run for each stage whose output was reused, with the id of the run that made the output.

    Args:
        label: the run's label.
        manifests: each stage output's manifest metadata, by the name to show.
    """
    parent = find_parent(label)
    if parent is None:
        return
    have = {run.data.tags.get("sha256.key") for run in _stage_runs(label)}
    for name, made in manifests.items():
        if made.get("key") in have:
            continue
        tags = {
            "mlflow.parentRunId": parent.info.run_id,
            STAGE_OF: label,
            "espalier.stage": made["stage"],
            "sha256.key": made["key"],
            "sha256.code": made["code"],
            "espalier.reused_from": made["mlflow_run_id"],
        }
        run = client().create_run(experiment_id(), run_name=f"{name} (reused)", tags=tags)
        client().set_terminated(run.info.run_id, "FINISHED")


def leave_report(label: str, files: Mapping[str, str], metrics: Mapping[str, float], note: str = "") -> None:
    """Log the report's files, summary metrics and description (Markdown) to the parent run."""
    parent = find_parent(label)
    if parent is None:
        return
    for name, text in files.items():
        client().log_text(parent.info.run_id, text, name)
    if note:
        client().set_tag(parent.info.run_id, "mlflow.note.content", note)
    now = int(time.time() * 1000)
    client().log_batch(parent.info.run_id, metrics=[Metric(name, value, now, 0) for name, value in metrics.items()])


def _end(run_id: str, state: str) -> None:
    """End a stage's run. Best effort: an MLflow outage must not fail the stage or hide its error."""
    try:
        client().set_terminated(run_id, state)
    except Exception as error:
        log.warning("MLflow was not told that the run %s is %s (%s)", run_id, state, error)


def _nested(label: str, name: str) -> str:
    parent = find_parent(label)
    tags = {"mlflow.parentRunId": parent.info.run_id} if parent else {}
    return client().create_run(experiment_id(), run_name=name, tags=tags).info.run_id


def _plugin_parent(label: str) -> str | None:
    """The parent of this task's run, created by the Kubeflow server's plugin; None if it belongs to another recompression."""
    own = MlflowSettings().run_id
    if not own:
        return None
    parent = client().get_run(own).data.tags.get("mlflow.parentRunId", own)
    taken = client().get_run(parent).data.tags.get(LABEL, label) != label
    return None if taken else parent


def _stage_runs(label: str) -> list[Run]:
    """The runs of the recompression's stages."""
    return list(client().search_runs([experiment_id()], filter_string=f"tags.`{STAGE_OF}` = '{label}'"))


def _log(run_id: str, tags: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Log tags and params; MLflow accepts at most 100 params in a call."""
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
