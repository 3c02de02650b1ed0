"""Why a stage would run: which part of its key differs from the newest output of that stage.

Nothing is fetched, stored or started; the store and MLflow are only asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from components.lib.differences import changed, flat
from components.lib.recipe.schema import Recipe
from components.lib.stage.run import Opened
from components.lib.store.store import Store
from components.lib.tracking import registry
from components.pin.pin import find_release, find_text
from components.pin.tasks import find_task
from pipeline.recompress import recompress
from pipeline.runners.graph import Output, Task, tasks_of

State = Literal["made", "skipped", "to make", "unknown"]

LOOKED_AT = 20
"""How many of a stage's newest outputs are searched for one of the same variant."""


@dataclass(frozen=True)
class Answer:
    """The answer for one stage."""

    stage: str
    state: State
    reasons: tuple[str, ...] = ()


def why(recipe: Recipe, release: str, name: str, store: Store) -> list[Answer]:
    """Say for each stage whether its output is in the store, and if not, how its key differs from the newest output.

    Args:
        recipe: the recipe, with its texts and task files not yet in the store.
        release: a folder, a GGUF file, an s3:// prefix, a Hub id with an optional @revision, or models:/name@alias.
        name: the registered model's name; its champion is an input of the evaluation.

    Raises:
        Refusal: the release or a text cannot be found, or the recipe cannot be applied to the release.
    """
    dense = find_release(release, recipe, store)
    texts = {dotted: find_text(text, store) for dotted, text in recipe.texts()}
    tasks = {task: find_task(task, recipe.evaluate.remote_code, store) for task in recipe.evaluate.task_files}
    if dense is None or None in {**texts, **tasks}.values():
        missing = [name for name, found in {**texts, **tasks}.items() if found is None]
        missing += [] if dense else ["the release"]
        reason = f"not in the store yet: {', '.join(missing)}"
        return [Answer(task.name, "to make", (reason,)) for task in tasks_of(recompress) if task.stage]
    champion = registry.aliased(name, "champion")
    pinned = recipe.with_texts({dotted: str(text) for dotted, text in texts.items()})
    pinned = pinned.with_tasks({task: str(reference) for task, reference in tasks.items()})
    outputs: dict[Output, str | None] = {
        Output("pin", "release"): str(dense),
        Output("pin", "champion"): str(champion.reference) if champion else "",
    }
    return [_answer(task, pinned, outputs, store) for task in tasks_of(recompress) if task.stage]


def _answer(task: Task, recipe: Recipe, outputs: dict[Output, str | None], store: Store) -> Answer:
    """Answer for one task, and add its output to `outputs` for the tasks that read it."""
    stage = task.stage
    assert stage is not None
    own = Output(task.name, "Output")
    waited = sorted({output.task for output in _outputs(task.inputs) if outputs.get(output, "") is None})
    given = {
        name: value
        for name, value in task.resolved({key: value or "" for key, value in outputs.items()}).items()
        if name not in ("run", "recipe", "kind")
    }
    if not stage.asked(recipe, task.variant):
        passed = task.inputs.get(stage.passes)
        outputs[own] = outputs.get(passed, "") if isinstance(passed, Output) else ""
        return Answer(task.name, "skipped")
    if waited:
        outputs[own] = None
        return Answer(task.name, "unknown", (f"it reads the output of {', '.join(waited)}, which is still to be made",))
    opened = Opened(stage, "", recipe, task.variant, given, store)
    outputs[own] = opened.found
    if opened.found:
        return Answer(task.name, "made")
    return Answer(task.name, "to make", tuple(_differences(opened, store)))


def _outputs(value: Any) -> Iterator[Output]:
    if isinstance(value, Output):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _outputs(part)


def _differences(opened: Opened[Any], store: Store) -> Iterator[str]:
    """Yield how the key differs from that of the newest output of the same stage and variant."""
    for prefix in store.newest(f"stages/{opened.stage.name}")[:LOOKED_AT]:
        found = store.find(prefix)
        before = store.manifest(found).metadata.get("made_of") if found else None
        if before and before["variant"] == opened.variant:
            yield from differences(before, opened.made_of)
            return
    yield "there is no output of this stage yet"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of a key that differ, one sentence each.

    Args:
        before: the parts of an earlier output's key (`Opened.made_of`).
        now: the parts of the present key.
    """
    for name, one, other in changed(before["inputs"], now["inputs"]):
        if one is None or other is None:
            yield f"input {name}: {'added' if one is None else 'absent now'}"
        else:
            yield f"input {name}: other content"
    for name, one, other in changed(flat(before["settings"]), flat(now["settings"])):
        yield f"setting {name}: {_shown(one)} → {_shown(other)}"
    for name, one, other in changed(before["modules"], now["modules"]):
        yield f"code {name}: {'added' if one is None else 'no longer used' if other is None else 'changed'}"
    for name, one, other in changed(before["libraries"], now["libraries"]):
        yield f"library {name}: {_shown(one)} → {_shown(other)}"
    if before["salt"] != now["salt"]:
        yield f"salt: {before['salt']} → {now['salt']}"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
