"""The watcher's recurring run on Kubeflow: create, show, pause, resume and delete it by its name.

Kubeflow neither keeps the names of recurring runs unique nor changes a recurring run. So `create` looks the name up first: it
keeps an equal schedule and replaces a different one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from croniter import croniter
from kfp_server_api import V2beta1RecurringRun as RecurringRun

from components.lib.errors import Refusal
from pipeline.kubeflow.client import KubeflowClient, PipelineVersion
from pipeline.kubeflow.compile import compile_pipeline, configured_for_cluster
from pipeline.kubeflow.profile import Profile
from pipeline.recompress import recompress
from pipeline.watch import watch_pipeline

PIPELINE = "espalier-watch"

_FIELDS = (
    ("second", 0, 59),
    ("minute", 0, 59),
    ("hour", 0, 23),
    ("day of month", 1, 31),
    ("month", 1, 12),
    ("day of week", 0, 6),
)
"""The fields of a cron expression in Kubeflow's order, each with its lowest and highest number."""

_PART = re.compile(r"[*?]|(\d+|[a-z]{3})(-(\d+|[a-z]{3}))?", re.IGNORECASE)
"""`*`, `?`, `n` or `n-m`, without its step."""


@dataclass(frozen=True)
class Plan:
    """The settings of a recurring run."""

    name: str
    cron: str
    parameters: Mapping[str, Any]
    service_account: str | None = None
    pipeline_root: str | None = None


def check_cron(text: str) -> str:
    """Return the expression of six fields (second, minute, hour, day of month, month, day of week), single-spaced.

    Raises:
        Refusal: it has another number of fields, or a field that Kubeflow's scheduler does not read.
    """
    fields = text.split()
    if len(fields) != len(_FIELDS):
        hint = f"write '0 {text}'" if len(fields) == 5 else "write '0 0 3 * * *' for three o'clock every night"
        raise Refusal(
            f"the cron expression {text!r} has {len(fields)} fields, and Kubeflow's has 6, seconds first: {hint}"
        )
    for position, (name, low, high) in enumerate(_FIELDS):
        for part in fields[position].split(","):
            if not _is_read(part, position):
                raise Refusal(
                    f"the cron expression {text!r} has {part!r} as its {name}: "
                    f"write a number of {low} to {high}, *, a range such as {low}-{high}, or a step such as */{max(2, low)}"
                )
    return " ".join(fields)


def _is_read(part: str, position: int) -> bool:
    """Return True if both croniter and Kubeflow's scheduler, robfig/cron, read this part of the field at `position`.

    croniter also reads L, W, #, ranges that wrap around and 7 as Sunday, which robfig/cron refuses.
    """
    span = part.partition("/")[0]
    if not _PART.fullmatch(span):
        return False
    try:
        _values(part, position)
        bounds = [(bound, _values(bound, position)[0]) for bound in span.split("-") if bound not in "*?"]
    except ValueError:
        return False
    values = [value for _, value in bounds]
    return values == sorted(values) and all(int(bound) == value for bound, value in bounds if bound.isdecimal())


def _values(part: str, position: int) -> list[Any]:
    """Return the numbers that the part stands for in the field at `position`. Raises ValueError if croniter does not read it."""
    fields = ["*"] * len(_FIELDS)
    fields[position] = part
    expanded = croniter.expand(" ".join(fields), second_at_beginning=True)[0]
    # croniter moves the seconds to the end.
    return expanded[position - 1]


def compile_watch(profile: Profile, at_most: int, mutable: bool = False) -> str:
    """Return the watcher's pipeline as YAML, its tasks and those of the pipeline inside it configured by the profile.

    Raises:
        Refusal: the profile names no image, or names one by a tag and `mutable` is False.
    """
    watch = watch_pipeline(at_most, configured_for_cluster(recompress, profile, mutable))
    return compile_pipeline(watch, profile, mutable)


def create(kubeflow: KubeflowClient, plan: Plan, package: str) -> tuple[RecurringRun, bool]:
    """Make the recurring run of the plan unless it exists, and return it with True if it was made.

    Runs do not overlap, and missed runs are not made up for: one run of the watcher finds every new release.

    Args:
        kubeflow: the server.
        plan: the settings of the recurring run.
        package: the watcher's pipeline, compiled.

    Raises:
        Refusal: the cron expression is wrong, or Kubeflow refuses the request.
    """
    check_cron(plan.cron)
    version = kubeflow.upload(PIPELINE, package)
    with kubeflow.asked():
        experiment_id = kubeflow.experiment_id()
        known = _named(kubeflow, plan.name, experiment_id)
        description = f"plan {_digest(plan, version)}"
        same = [one for one in known if one.description == description]
        made = same[0] if same else _make(kubeflow, plan, experiment_id, version, description)
        # Create before deleting: a crash leaves two schedules, not none.
        for other in known:
            if other.recurring_run_id != made.recurring_run_id:
                kubeflow.client.delete_recurring_run(other.recurring_run_id)
    return made, not same


def _make(
    kubeflow: KubeflowClient, plan: Plan, experiment_id: str, version: PipelineVersion, description: str
) -> RecurringRun:
    # No enable_caching: Kubeflow ignores it for a pipeline's version, so the pipeline itself disables caching.
    return kubeflow.client.create_recurring_run(
        experiment_id=experiment_id,
        job_name=plan.name,
        description=description,
        cron_expression=check_cron(plan.cron),
        max_concurrency=1,
        no_catchup=True,
        params=dict(plan.parameters),
        pipeline_id=version.pipeline_id,
        version_id=version.version_id,
        service_account=plan.service_account,
        pipeline_root=plan.pipeline_root,
    )


def find(kubeflow: KubeflowClient, name: str) -> list[RecurringRun]:
    """Return every recurring run of that name, newest first; there are several if a replacement was interrupted.

    Raises:
        Refusal: there is none.
    """
    server = kubeflow.server
    with kubeflow.asked():
        try:
            experiment = kubeflow.client.get_experiment(experiment_name=server.experiment, namespace=server.namespace)
        except ValueError:
            # kfp raises ValueError if there is no such experiment.
            found = []
        else:
            found = _named(kubeflow, name, experiment.experiment_id)
    if not found:
        raise Refusal(
            f"Kubeflow has no schedule {name!r} in the experiment {server.experiment!r}: make it (espalier schedule create)"
        )
    return found


def pause(kubeflow: KubeflowClient, name: str) -> None:
    """Start no more runs; a run in progress continues. Raises Refusal if there is no schedule of that name."""
    for run in find(kubeflow, name):
        with kubeflow.asked():
            kubeflow.client.disable_recurring_run(run.recurring_run_id)


def resume(kubeflow: KubeflowClient, name: str) -> None:
    """Start runs again, from the next due time on. Raises Refusal if there is no schedule of that name."""
    with kubeflow.asked():
        kubeflow.client.enable_recurring_run(find(kubeflow, name)[0].recurring_run_id)


def delete(kubeflow: KubeflowClient, name: str) -> None:
    """Delete every recurring run of that name. Raises Refusal if there is none."""
    for run in find(kubeflow, name):
        with kubeflow.asked():
            kubeflow.client.delete_recurring_run(run.recurring_run_id)


def _named(kubeflow: KubeflowClient, name: str, experiment_id: str) -> list[RecurringRun]:
    """Return every recurring run of that name in the experiment with this id, newest first."""
    wanted = json.dumps({"predicates": [{"key": "display_name", "operation": "EQUALS", "string_value": name}]})
    found = _all(
        lambda token: kubeflow.client.list_recurring_runs(
            page_token=token, page_size=100, sort_by="created_at desc", experiment_id=experiment_id, filter=wanted
        ),
        "recurring_runs",
    )
    return [run for run in found if run.display_name == name]


def _all(page: Callable[[str], Any], field: str) -> Iterator[Any]:
    """Yield every entry of a list that the server returns in pages."""
    token = ""
    while True:
        answer = page(token)
        yield from getattr(answer, field) or ()
        token = answer.next_page_token or ""
        if not token:
            return


def _digest(plan: Plan, version: PipelineVersion) -> str:
    """Return a digest that identifies a plan; parameters that the server returns differ in form and cannot be compared."""
    made_of = [plan.cron.split(), dict(plan.parameters), plan.service_account, plan.pipeline_root, version.version_id]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
