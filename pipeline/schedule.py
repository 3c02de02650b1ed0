"""The watcher's recurring run on Kubeflow: made, shown, paused, resumed and deleted by its name.

Kubeflow does not keep a recurring run's name unique and cannot change one. So a name is looked up first: the same schedule
again is left as it is, and another schedule under the name takes its place.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.errors import Refusal, Unavailable

if TYPE_CHECKING:
    from kfp import Client
    from kfp_server_api import V2beta1RecurringRun as RecurringRun

PIPELINE = "espalier-watch"
EXPERIMENT = "espalier"

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_FIELDS: tuple[tuple[str, int, int, list[str]], ...] = (
    ("second", 0, 59, []),
    ("minute", 0, 59, []),
    ("hour", 0, 23, []),
    ("day of month", 1, 31, []),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 6, _DAYS),
)


@dataclass(frozen=True)
class Plan:
    """What a recurring run is to be."""

    name: str
    cron: str
    parameters: Mapping[str, Any]
    service_account: str | None = None


def check_cron(text: str) -> str:
    """Return the expression of six fields (second, minute, hour, day of month, month, day of week), single-spaced.

    Raises:
        Refusal: it has another number of fields, or one that Kubeflow's scheduler does not read.
    """
    fields = text.split()
    if len(fields) != len(_FIELDS):
        hint = f"write '0 {text}'" if len(fields) == 5 else "write '0 0 3 * * *' for three o'clock every night"
        raise Refusal(
            f"the cron expression {text!r} has {len(fields)} fields, and Kubeflow's has 6, seconds first: {hint}"
        )
    for field, (name, low, high, words) in zip(fields, _FIELDS, strict=True):
        for part in field.split(","):
            if not _is_part(part, low, high, words):
                raise Refusal(
                    f"the cron expression {text!r} has {part!r} as its {name}: "
                    f"write a number of {low} to {high}, *, a range such as {low}-{high}, or a step such as */{max(2, low)}"
                )
    return " ".join(fields)


def _is_part(part: str, low: int, high: int, words: list[str]) -> bool:
    """Whether it is `*`, `?`, `n`, `n-m`, each but `?` with an optional `/step`, in the field's bounds."""
    match = re.fullmatch(r"(\*|\?|\w+)(?:-(\w+))?(?:/(\d+))?", part)
    if not match:
        return False
    first, last, step = match.groups()
    if step is not None and (int(step) == 0 or first == "?"):
        return False
    if first in {"*", "?"}:
        return last is None
    bounds = [_number(word, low, words) for word in (first, last) if word is not None]
    return all(low <= bound <= high for bound in bounds) and bounds == sorted(bounds)


def _number(word: str, low: int, words: list[str]) -> int:
    """The number a field's word stands for; -1 for none."""
    if word.isdecimal():
        return int(word)
    return words.index(word.lower()) + low if word.lower() in words else -1


def upload(client: Client, package: Path) -> tuple[str, str]:
    """Upload a compiled pipeline once: a version is named by its digest. Returns the ids of the pipeline and the version."""
    version = hashlib.sha256(package.read_bytes()).hexdigest()[:16]
    with asking(client):
        pipeline = client.get_pipeline_id(PIPELINE)
        if pipeline is None:
            # The first upload makes a version of its own, under the pipeline's name: the named one follows it.
            pipeline = client.upload_pipeline(str(package), pipeline_name=PIPELINE).pipeline_id
        for known in _all(lambda token: client.list_pipeline_versions(pipeline, token, 100), "pipeline_versions"):
            if known.display_name == version:
                return pipeline, known.pipeline_version_id
        made = client.upload_pipeline_version(str(package), pipeline_version_name=version, pipeline_id=pipeline)
    return pipeline, made.pipeline_version_id


def create(client: Client, plan: Plan, package: Path) -> tuple[RecurringRun, bool]:
    """Make the recurring run that the plan says, unless it is there. Returns it, and whether it was made.

    One run at a time, and none that makes up for missed ones: a watcher that looks once sees all that is new.
    """
    cron = check_cron(plan.cron)
    pipeline, version = upload(client, package)
    description = f"plan {_digest(plan, pipeline, version)}"
    with asking(client):
        experiment = client.create_experiment(EXPERIMENT).experiment_id
        known = _named(client, plan.name)
        same = [one for one in known if one.description == description]
        made = (
            same[0]
            if same
            else client.create_recurring_run(
                experiment_id=experiment,
                job_name=plan.name,
                description=description,
                cron_expression=cron,
                max_concurrency=1,
                no_catchup=True,
                params=dict(plan.parameters),
                pipeline_id=pipeline,
                version_id=version,
                service_account=plan.service_account,
            )
        )
        # The old goes when the new is there, so that a failure in between leaves a schedule too many rather than none.
        for other in known:
            if other.recurring_run_id != made.recurring_run_id:
                client.delete_recurring_run(other.recurring_run_id)
    return made, not same


def find(client: Client, name: str) -> RecurringRun:
    """The recurring run of that name. Raises Refusal where there is none."""
    with asking(client):
        known = _named(client, name)
    if not known:
        raise Refusal(f"Kubeflow has no recurring run {name!r}: make it (espalier schedule create)")
    return known[0]


def pause(client: Client, name: str) -> None:
    """Start no more runs. One that is running goes on. Raises Refusal where there is no schedule of that name."""
    run = find(client, name)
    with asking(client):
        client.disable_recurring_run(run.recurring_run_id)


def resume(client: Client, name: str) -> None:
    """Start runs again, from the next time on. Raises Refusal where there is no schedule of that name."""
    run = find(client, name)
    with asking(client):
        client.enable_recurring_run(run.recurring_run_id)


def delete(client: Client, name: str) -> None:
    """Delete every recurring run of that name. Raises Refusal where there is none."""
    find(client, name)
    with asking(client):
        for run in _named(client, name):
            client.delete_recurring_run(run.recurring_run_id)


def _named(client: Client, name: str) -> list[RecurringRun]:
    """Every recurring run of that name in the experiment, newest first."""
    try:
        experiment = client.get_experiment(experiment_name=EXPERIMENT, namespace=client.get_user_namespace())
    except ValueError:
        return []
    wanted = {"predicates": [{"key": "display_name", "operation": "EQUALS", "string_value": name}]}
    found = _all(
        lambda token: client.list_recurring_runs(
            page_token=token,
            page_size=100,
            sort_by="created_at desc",
            experiment_id=experiment.experiment_id,
            filter=json.dumps(wanted),
        ),
        "recurring_runs",
    )
    return [run for run in found if run.display_name == name]


def _all(page: Callable[[str], Any], field: str) -> Iterator[Any]:
    """Every entry of a list that the server hands out in pages."""
    token = ""
    while True:
        answer = page(token)
        yield from getattr(answer, field) or ()
        token = answer.next_page_token or ""
        if not token:
            return


def _digest(plan: Plan, pipeline: str, version: str) -> str:
    """Names a plan, so that it is known again: the server gives parameters back in a form of its own."""
    made_of = [plan.name, plan.cron.split(), dict(plan.parameters), plan.service_account, pipeline, version]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def asking(client: Client) -> Iterator[None]:
    """Say in one sentence what Kubeflow did not do.

    Raises:
        Refusal: it does not know this client, or refuses what is asked of it.
        Unavailable: it does not answer.
    """
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    address = client._recurring_run_api.api_client.configuration.host
    try:
        # The client prints addresses as it goes.
        with redirect_stdout(sys.stderr):
            yield
    except ApiException as error:
        if error.status in {401, 403}:
            raise Refusal(
                f"Kubeflow at {address} refuses this client ({error.status}): check the token and the service account's role"
            ) from None
        said = " ".join(str(error.body or error.reason).split())[:300]
        raise Refusal(f"Kubeflow at {address} did not do it ({error.status}: {said}): check the arguments") from None
    except (HTTPError, OSError) as error:
        raise Unavailable(
            f"Kubeflow at {address} does not answer ({type(error).__name__}): start it, or correct --host"
        ) from None
