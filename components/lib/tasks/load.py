"""Load tasks through lm-eval, an optional dependency (`espalier[tasks]`): by name, from collected folders, from questions."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.lib.errors import Refusal

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

Loaded = dict[str, Any]
"""What `lm_eval.evaluate` takes: `tasks` by name, `groups` by name, and the names in each group."""


def load_tasks(
    names: Sequence[str] = (),
    folders: Sequence[Path] = (),
    configs: Sequence[Mapping[str, Any]] = (),
    remote_code: bool = False,
) -> Loaded:
    """Load the tasks and their data.

    Args:
        names: lm-eval's tasks and groups.
        folders: as `components.lib.tasks.files.collect` fills them; every task in them is loaded. They must be there as long as
            the tasks are used.
        configs: task files as mappings.
        remote_code: whether the tasks of the folders may run Python code that comes with them.

    Raises:
        Refusal: lm-eval is not installed or has no such task, two tasks have one name, or a task's data cannot be fetched.
    """
    manager = _manager(shipped=bool(names))
    if not remote_code:
        _sandbox_templates()
    found: list[Task | Group] = []
    for name in names:
        _require_known(name, manager)
        found += _load(manager, name, name)
    for folder in folders:
        with _inside(folder):
            there = _manager(shipped=False, folder=folder)
            for name in there.all_subtasks:
                if not remote_code:
                    _require_own_metrics(name, there)
                found += _load(there, name, name)
    for config in configs:
        found += _load(manager, dict(config), str(config["task"]))
    return _together(manager, found)


def _manager(shipped: bool, folder: Path | None = None) -> TaskManager:
    """Make lm-eval's index of tasks; without `shipped` it skips its own ten thousand, which take seconds to list."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise Refusal(
            "evaluate.tasks and evaluate.continuations need lm-eval, which is not installed: install espalier[tasks], or leave them out"
        ) from None
    # Some of the files that it ships warn of other files that it ships.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=shipped, include_path=folder)


def _sandbox_templates() -> None:
    """Let lm-eval render the templates of tasks in a sandbox: outside of one, a template can run any Python code."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, ImmutableSandboxedEnvironment):
        sandbox = ImmutableSandboxedEnvironment(
            loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True
        )
        sandbox.filters |= utils.env.filters
        utils.env = sandbox


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Read relative data files from the folder, and keep datasets' copies of them there, not in the user's cache."""
    import datasets

    cache = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / ".datasets"
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        datasets.config.HF_DATASETS_CACHE = cache


def _require_known(name: str, manager: TaskManager) -> None:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "lm-eval ls tasks lists them; a path has a / or ends in .yaml"
        raise Refusal(f"evaluate.tasks names {name!r}, which lm-eval does not know: {hint}")


def _require_own_metrics(name: str, manager: TaskManager) -> None:
    """Refuse metrics that lm-eval does not have: it would look for their code on the Hub."""
    from lm_eval.api.registry import get_metric_aggregation, metric_registry

    get_metric_aggregation("acc")  # fills the registry
    config = manager.task_index[name].cfg or {}
    for metric in config.get("metric_list") or []:
        if metric.get("metric") not in metric_registry:
            raise Refusal(
                f"the task {name} has the metric {metric.get('metric')!r}, which lm-eval does not have: use one that it has, "
                "or set evaluate.remote_code to true to fetch its code"
            )


def _load(manager: TaskManager, spec: str | dict[str, Any], name: str) -> list[Task | Group]:
    """Load a task or a group; its data is fetched."""
    try:
        loaded = manager.load(spec)
    except OSError as error:  # datasets' ConnectionError is one
        raise Refusal(
            f"evaluate.tasks names {name!r}, whose data cannot be fetched ({_short(error)}): fetch it beforehand, or leave the task out"
        ) from None
    except Exception as error:  # lm-eval and datasets raise any kind for a task file that is wrong
        raise Refusal(
            f"the task {name} cannot be loaded ({type(error).__name__}: {_short(error)}): correct it"
        ) from None
    for one, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            reason = (
                "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "shows images or sound"
            )
            raise Refusal(f"evaluate.tasks names {one!r}, which {reason}: leave it out")
    inside = {child for group in loaded["groups"].values() for child in group.child_names}
    every = loaded["tasks"] | loaded["groups"]
    return [part for one, part in every.items() if one not in inside]


def _together(manager: TaskManager, found: list[Task | Group]) -> Loaded:
    """Return the tasks and groups as lm-eval's functions take them."""
    leaves = [task.task_name for one in found for task in _leaves(one)]
    for name in leaves:
        if leaves.count(name) > 1:
            raise Refusal(f"evaluate.tasks has {name!r} twice: name each task once, and none of a group that is named")
    return dict(manager.load(found))


def _leaves(one: Task | Group) -> list[Task]:
    return one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
