"""Run the pipeline, here or on a cluster: checks first, then the runner, then the report."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from components.lib.checks import check_optimizers
from components.lib.errors import Refusal, StageFailed, Unavailable
from components.lib.given_yaml import short
from components.lib.provenance.signature import check_signing
from components.lib.recipe.schema import Recipe
from components.lib.settings import MlflowSettings, ProcessSettings, StoreSettings
from components.lib.store.runs import item_of, leave_item
from components.lib.store.store import Store, need_space
from components.lib.tracking import client
from components.lib.transformer.dequantise import opened
from components.pin.pin import check_checkpoint, check_text, pin_files, pin_folder
from components.pin.tasks import check_task
from components.register.report import Report
from components.register.searched import target_sentence
from pipeline.recompress import recompress
from pipeline.runners.graph import tasks_of
from pipeline.runners.local import LocalRunner
from pipeline.runners.runner import Runner

if TYPE_CHECKING:
    from pipeline.kubeflow.profile import Profile


@dataclass(frozen=True)
class Result:
    """The report of a run, and the folder of its files on this machine."""

    report: Report
    folder: Path
    """Holds report.html, report.json and log.txt."""


def run(
    recipe: Recipe,
    release: str,
    name: str | None,
    home: Path,
    console: Console,
    label: str = "",
    on: Runner = LocalRunner(),  # noqa: B008  # it is immutable
) -> Result:
    """Recompress `release` as the recipe says and register it under `name`.

    Args:
        recipe: the recipe, with its texts and task files not yet in the store.
        release: a folder, a GGUF file, an s3:// prefix, a Hub id with an optional @revision, or models:/name@alias.
        name: the registered model's name; None measures and registers nothing.
        home: the folder of all state.
        console: shows the progress.
        label: the run's label if a watcher chose it; a new one if it is empty.
        on: the runner of the stages.

    Raises:
        Refusal: an error that the user can correct, usually found before any work.
        StageFailed: a stage broke; the outputs finished before it are kept.
    """
    check(recipe, release, name)
    check_processes(recipe, getattr(on, "profile", None))
    if on.embeds:
        check_room([recipe], release, home)
        # Check external services before starting embedded ones.
        check_services()
    label = label or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = home / "runs" / label
    with on.services(home) as environment, in_environment(environment):
        store = Store.from_environment()
        check_services()
        check_memory(recipe, release, on, console)
        pinned = to_store(release, recipe, store)
        result = _attempt(recipe, pinned, name, label, folder, console, on, store)
        safer = _safer(recipe, result.report) if name is not None else None
        if safer is None:
            return result
        console.print(f"{target_sentence(result.report)} A second attempt follows.", highlight=False, markup=False)
        again = f"{label}-again"
        item = item_of(label, store)
        if item:
            leave_item(again, item, store)
        return _attempt(safer, pinned, name, again, home / "runs" / again, console, on, store)


def _attempt(
    recipe: Recipe, release: str, name: str | None, label: str, folder: Path, console: Console, on: Runner, store: Store
) -> Result:
    arguments = {
        "release": release,
        "recipe": files_to_store(recipe, store).to_yaml(),
        "name": name or "",
        "run": label,
    }
    on.run(arguments, folder / "log.txt", console)
    return Result(fetch_report(store, label, folder), folder)


def _safer(recipe: Recipe, report: Report) -> Recipe | None:
    """Return the recipe whose search ends one depth before the one that the whole recipe did not confirm.

    Returns:
        None if the target holds, there is no such depth, or the target is not of quality: less depth gives neither speed nor size.
    """
    search = report.search
    if search is None or search.next is None or report.verdict.target_holds:
        return None
    if not (recipe.target and recipe.target.of_quality):
        return None
    return recipe.with_ratios(search.next)


def check(recipe: Recipe, release: str, name: str | None) -> None:
    """Check the name and the signing key if there is a name, and a release, texts and task files on this machine. Raises Refusal before anything is started."""
    if name is not None:
        check_name(name)
        check_signing()
    if is_local(release):
        check_checkpoint(Path(release).expanduser(), recipe)
    for _, text in recipe.texts():
        if _is_here(text.path):
            check_text(text.path or "")
    for task in recipe.evaluate.task_files:
        if _is_here(task):
            check_task(task, recipe.evaluate.remote_code)


def check_processes(recipe: Recipe, profile: Profile | None) -> None:
    """Raise Refusal if the processes of a profile, or of this machine, cannot share a training of the recipe."""
    parallel = profile.parallel() if profile else ProcessSettings().parallel
    for task in tasks_of(recompress):
        # The number of this machine's GPUs takes seconds to find.
        if parallel == "fsdp" and task.stage and task.stage.shared and task.stage.asked(recipe, task.variant):
            processes = profile.processes(task.stage.name) if profile else ProcessSettings().count
            check_optimizers(task.stage, recipe, processes, parallel)


def check_memory(recipe: Recipe, release: str, on: Runner, console: Console) -> None:
    """Warn of each stage whose device has no known size. Raises Refusal if a device is too small, with the cure."""
    from pipeline.plan.plan import require_memory

    for warning in require_memory(recipe, release, getattr(on, "profile", None)):
        console.print(f"warning: {warning}", highlight=False, markup=False)


def check_name(name: str) -> None:
    """Raise Refusal if MLflow, its filters or a path could misread the registered model's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", name):
        raise Refusal(
            f"the registered model's name is {short(repr(name))}: use letters, digits, '_' and '-', 128 at most"
        )


def check_room(recipes: Sequence[Recipe], release: str, home: Path) -> None:
    """Raise Refusal if the store is embedded and its disk has no room for every checkpoint that runs of the recipes leave there.

    Files that are in the home already reduce the space needed, so that a resumed run does not need it twice.
    """
    if StoreSettings().bucket or not is_local(release):
        return
    checkpoints = 1 + sum(map(_checkpoints, recipes))  # 1 is the release
    size = opened(Path(release).expanduser()).bytes
    try:
        need_space(home, checkpoints * size)
    except Unavailable:
        # Only now are the files counted, of which there may be many thousands.
        need_space(home, checkpoints * size - _bytes_below(home))


def _checkpoints(recipe: Recipe) -> int:
    """Return how many checkpoints a run of the recipe leaves in the store."""
    stages = ((task.stage, task.variant) for task in tasks_of(recompress))
    return sum(stage.leaves_checkpoint and stage.asked(recipe, variant) for stage, variant in stages if stage)


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # A concurrent run may delete a file between listing and reading its size.
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def check_services() -> None:
    """Check that the store and MLflow answer, if the environment names them.

    A cluster's stages may use an MLflow that this machine does not know.
    """
    if StoreSettings().bucket:
        Store.from_environment().check()
    if MlflowSettings().tracking_uri:
        client.check()


def is_local(release: str) -> bool:
    """Return True if the release is a folder or a file of this machine, or is written as only a path can be."""
    return Path(release).expanduser().exists() or release.startswith((".", "/", "~"))


def to_store(release: str, recipe: Recipe, store: Store) -> str:
    """Put a release that is a folder or a file into the store and return its reference; return every other release unchanged."""
    return str(pin_folder(Path(release).expanduser(), recipe, store)) if is_local(release) else release


def files_to_store(recipe: Recipe, store: Store) -> Recipe:
    """Put the recipe's local texts and task files into the store, and return the recipe with references in their places."""
    return pin_files(recipe, store, _is_here)


def _is_here(path: str | None) -> bool:
    return path is not None and not path.startswith("s3://")


def fetch_report(store: Store, label: str, folder: Path) -> Report:
    """Copy a run's report from the store into `folder`. Raises StageFailed if the run left none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.html"):
        text = store.read_text(f"runs/{label}/{name}")
        if text is None:
            raise StageFailed(f"the run {label} left no {name} in the store (the whole log: {folder / 'log.txt'})")
        (folder / name).write_text(text)
    return Report.load(folder / "report.json")


@contextmanager
def in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block, for this process and the stages it starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
