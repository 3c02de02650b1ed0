"""The watcher's recurring run on Kubeflow: made, shown, paused, resumed and deleted by its name.

Kubeflow does not keep a recurring run's name unique and cannot change one. So a name is looked up first: the same schedule
again is left as it is, and another schedule under the name takes its place.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfp import Client, compiler
from kfp_server_api import ApiException
from urllib3.exceptions import HTTPError

from components.errors import Refusal, Unavailable
from pipeline.cluster import Profile
from pipeline.compile import digest, dressed, for_cluster
from pipeline.recompress import recompress
from pipeline.watch import watch_pipeline

if TYPE_CHECKING:
    from kfp.dsl import PipelineTask
    from kfp_server_api import V2beta1RecurringRun as RecurringRun

PIPELINE = "espalier-watch"

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
    experiment: str
    service_account: str | None = None
    pipeline_root: str | None = None


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


def connect(profile: Profile) -> Client:
    """A client of the profile's Kubeflow. Raises Unavailable where it does not answer."""
    server = profile.kubeflow
    with warnings.catch_warnings(), asking(server.host or "the cluster of the kubeconfig"):
        warnings.simplefilter("ignore", FutureWarning)
        return Client(host=server.host, ui_host=server.ui, namespace=server.namespace or "kubeflow")


def compile_watch(profile: Profile, at_most: int, mutable: bool = False) -> str:
    """The watcher's pipeline as YAML, every task of it, and of the pipeline inside it, dressed as the profile says.

    Raises:
        Refusal: the profile names no image, or one by a tag and `mutable` does not allow it.
    """
    image = profile.pinned_image(mutable)

    def dress(task: PipelineTask) -> None:
        # The task that is a whole pipeline has been dressed from inside.
        if task.container_spec is not None:
            task.set_container_image(image)
            profile.dress(task)

    outer = dressed(watch_pipeline(at_most, for_cluster(recompress, profile, mutable)), dress)
    with tempfile.TemporaryDirectory(prefix="espalier-compile-") as folder:
        path = Path(folder) / "watch.yaml"
        compiler.Compiler().compile(outer, str(path))
        return path.read_text()


def upload(client: Client, package: str) -> tuple[str, str]:
    """Upload a compiled pipeline once: a version is named by its digest. Returns the ids of the pipeline and the version."""
    version = digest(package)[:16]
    with asking(_address(client)), tempfile.TemporaryDirectory(prefix="espalier-upload-") as folder:
        path = Path(folder) / "watch.yaml"
        path.write_text(package)
        pipeline = client.get_pipeline_id(PIPELINE)
        if pipeline is None:
            # Kubeflow makes a version of the first upload too, under the pipeline's own name.
            pipeline = client.upload_pipeline(str(path), pipeline_name=PIPELINE).pipeline_id
        for known in _all(lambda token: client.list_pipeline_versions(pipeline, token, 100), "pipeline_versions"):
            if known.display_name == version:
                return pipeline, known.pipeline_version_id
        made = client.upload_pipeline_version(str(path), pipeline_version_name=version, pipeline_id=pipeline)
    return pipeline, made.pipeline_version_id


def create(client: Client, plan: Plan, package: str) -> tuple[RecurringRun, bool]:
    """Make the recurring run that the plan says, unless it is there. Returns it, and whether it was made.

    One run at a time, and none to make up for missed ones: a watcher that looks once sees all that is new.

    Raises:
        Refusal: the cron expression is wrong, or Kubeflow refuses.
    """
    check_cron(plan.cron)
    pipeline, version = upload(client, package)
    with asking(_address(client)):
        experiment = client.create_experiment(plan.experiment).experiment_id
        known = _named(client, plan.name, experiment)
        description = f"plan {_digest(plan, pipeline, version)}"
        same = [one for one in known if one.description == description]
        made = same[0] if same else _make(client, plan, experiment, pipeline, version, description)
        # The old goes when the new is there: what fails in between leaves a schedule too many rather than none.
        for other in known:
            if other.recurring_run_id != made.recurring_run_id:
                client.delete_recurring_run(other.recurring_run_id)
    return made, not same


def _make(client: Client, plan: Plan, experiment: str, pipeline: str, version: str, description: str) -> RecurringRun:
    # No enable_caching: Kubeflow ignores it beside a pipeline's version, so the pipeline itself says what is not cached.
    return client.create_recurring_run(
        experiment_id=experiment,
        job_name=plan.name,
        description=description,
        cron_expression=check_cron(plan.cron),
        max_concurrency=1,
        no_catchup=True,
        params=dict(plan.parameters),
        pipeline_id=pipeline,
        version_id=version,
        service_account=plan.service_account,
        pipeline_root=plan.pipeline_root,
    )


def find(client: Client, name: str, experiment: str) -> RecurringRun:
    """The recurring run of that name. Raises Refusal where the experiment has none."""
    found = find_all(client, name, experiment)
    if not found:
        raise Refusal(
            f"Kubeflow has no schedule {name!r} in the experiment {experiment!r}: make it (espalier schedule create)"
        )
    return found[0]


def pause(client: Client, name: str, experiment: str) -> None:
    """Start no more runs. One that is running goes on. Raises Refusal where there is no schedule of that name."""
    run = find(client, name, experiment)
    with asking(_address(client)):
        client.disable_recurring_run(run.recurring_run_id)


def resume(client: Client, name: str, experiment: str) -> None:
    """Start runs again, from the next time on. Raises Refusal where there is no schedule of that name."""
    run = find(client, name, experiment)
    with asking(_address(client)):
        client.enable_recurring_run(run.recurring_run_id)


def delete(client: Client, name: str, experiment: str) -> None:
    """Delete every recurring run of that name. Raises Refusal where there is none."""
    find(client, name, experiment)
    for run in find_all(client, name, experiment):
        with asking(_address(client)):
            client.delete_recurring_run(run.recurring_run_id)


def find_all(client: Client, name: str, experiment: str) -> list[RecurringRun]:
    """Every recurring run of that name in the experiment, newest first; none where there is no such experiment."""
    with asking(_address(client)):
        try:
            within = client.get_experiment(experiment_name=experiment, namespace=client.get_user_namespace())
        except ValueError:
            return []
        return _named(client, name, within.experiment_id)


def _named(client: Client, name: str, experiment: str) -> list[RecurringRun]:
    """Every recurring run of that name in the experiment with this id, newest first."""
    wanted = json.dumps({"predicates": [{"key": "display_name", "operation": "EQUALS", "string_value": name}]})
    found = _all(
        lambda token: client.list_recurring_runs(
            page_token=token, page_size=100, sort_by="created_at desc", experiment_id=experiment, filter=wanted
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
    made_of = [plan.cron.split(), dict(plan.parameters), plan.service_account, plan.pipeline_root, pipeline, version]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def _address(client: Client) -> str:
    return str(client._recurring_run_api.api_client.configuration.host)


@contextmanager
def asking(address: str) -> Iterator[None]:
    """Say in one sentence what Kubeflow did not do.

    Raises:
        Refusal: it does not know this client, or refuses what is asked of it.
        Unavailable: it does not answer.
    """
    try:
        # The client prints addresses as it goes.
        with redirect_stdout(sys.stderr):
            yield
    except ApiException as error:
        if error.status in {401, 403}:
            raise Refusal(
                f"Kubeflow at {address} refuses this client ({error.status}): check the token and the account's role"
            ) from None
        said = " ".join(str(error.body or error.reason).split())[:300]
        raise Refusal(f"Kubeflow at {address} did not do it ({error.status}: {said}): check the arguments") from None
    except (HTTPError, OSError) as error:
        raise Unavailable(
            f"Kubeflow at {address} does not answer ({type(error).__name__}): start it, or correct the profile's kubeflow.host"
        ) from None
