"""How every stage runs: references in, work, a reference out, the run logged.

    with stage("prune", run=run, recipe=recipe, sections=(), inputs={"model": model, "selection": selection}) as this:
        if this.pending:
            from components.prune.prune import prune

            this.perform(prune)
        return this.reference

An output is named by what it is made of: its key is the hash of the stage, the digests of its inputs, the recipe's sections it
reads and the code that runs. A stage whose output is in the store already imports nothing heavy and does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from components.lib.recipe.schema import Recipe, plain
from components.lib.stage.events import StageEvents, reported
from components.lib.store.store import PrefixCheckpoints, Reference, Store

_REFERENCE = re.compile(r"^s3://\S+@(sha256:[0-9a-f]{64})$")


@contextmanager
def stage(
    name: str, *, run: str, recipe: str, sections: Sequence[str], inputs: Mapping[str, str], variant: str = ""
) -> Iterator[Stage]:
    """Open one run of one stage.

    Args:
        name: the stage, as it stands in keys, MLflow and reports: its folder's name.
        run: the label that this run's stages share; it names the parent run in MLflow.
        recipe: the recipe's YAML, its texts replaced by references.
        sections: dotted names of the recipe's parts that the output depends on.
        inputs: references by name; an empty one is an input that this run does without.
        variant: tells apart runs of one stage with the same inputs, such as the two controls.
    """
    with reported(f"{name} {variant}".strip(), run) as events:
        opened = Stage(name, run, Recipe.from_yaml(recipe), sections, inputs, variant, events)
        if not opened.pending:
            events.finish("reused")
        yield opened


class Stage:
    """One run of one stage, opened by `stage`."""

    def __init__(
        self,
        name: str,
        run: str,
        recipe: Recipe,
        sections: Sequence[str],
        inputs: Mapping[str, str],
        variant: str,
        events: StageEvents,
    ) -> None:
        self.name = name
        self.run = run
        self.recipe = recipe
        self.variant = variant
        self.events = events
        self.store = Store.from_environment()
        self.inputs = {name: Reference.parse(text) for name, text in inputs.items() if text}
        self.sections = {section: _section(recipe, section) for section in sections}
        found = self.store.find(self.prefix)
        self._reference = str(found) if found else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The named sections as plain data."""
        return plain(self.sections)

    @cached_property
    def code(self) -> str:
        """The version of the code that makes this stage's output."""
        return code_version(self.name)

    @cached_property
    def key(self) -> str:
        """sha256 over stage, variant, input digests, settings and code version (hex)."""
        made_of = {
            "stage": self.name,
            "variant": self.variant,
            "inputs": {name: reference.digest for name, reference in self.inputs.items()},
            "settings": _by_digest(self.settings),
            "code": self.code,
        }
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    @property
    def tags(self) -> dict[str, str]:
        """The tags of the stage's MLflow run: its key, its code and its inputs."""
        inputs = {f"espalier.input.{name}": str(reference) for name, reference in self.inputs.items()}
        return {"espalier.key": self.key, "espalier.code": self.code, **inputs}

    @property
    def prefix(self) -> str:
        """Where the output lies in the store."""
        return f"stages/{self.name}/{self.key}"

    @property
    def pending(self) -> bool:
        """Whether the output is still to be made."""
        return self._reference is None

    @property
    def reference(self) -> str:
        """The output's reference.

        Raises:
            RuntimeError: the output has not been made.
        """
        if self._reference is None:
            raise RuntimeError(f"the stage {self.name} has made no output")
        return self._reference

    def hand_on(self, name: str) -> None:
        """Make the input `name` the output ("" for none): the recipe asks nothing of this stage."""
        self._reference = str(self.inputs[name]) if name else ""
        self.events.finish("skipped")

    def perform(self, work: Callable[..., None], resumes: bool = False, **more: Any) -> None:
        """Fetch the inputs, call `work`, and put what it left in `out` into the store, the manifest last.

        Args:
            work: called by name with each input's folder, each section (under the last part of its name), `out`,
                `journal`, and `more`.
            resumes: the work takes `checkpoints` too, and goes on from the newest one.
        """
        from components.lib.tracking.runs import stage_run

        self.events.emit("started")
        with tempfile.TemporaryDirectory(prefix="espalier-", dir=os.environ.get("ESPALIER_SCRATCH")) as scratch:
            folders = {name: self.store.get(reference, Path(scratch) / name) for name, reference in self.inputs.items()}
            out = Path(scratch) / "out"
            out.mkdir()
            sections = {name.rpartition(".")[2]: section for name, section in self.sections.items()}
            checkpoints = StageCheckpoints(self.store, f"checkpoints/{self.key}", out)
            extra = {"checkpoints": checkpoints, **more} if resumes else more
            with stage_run(
                self.run, self.name, self.variant, self.tags, self.settings, out, self.events.emit
            ) as journal:
                began = time.perf_counter()
                work(**folders, **sections, out=out, journal=journal, **extra)
                seconds = time.perf_counter() - began
                journal.flush()
                self._reference = str(self.store.put(out, self.prefix, self.describe(seconds, journal.run_id)))
                journal.leave(out, self.reference, seconds)
        if resumes:
            self.store.delete(checkpoints.prefix)
        self.events.finish()

    def show(self, artifact: Any) -> None:
        """Fill a Kubeflow artifact with the output's manifest, for its user interface: the files stay in the store."""
        if not self._reference:
            return
        manifest = self.store.manifest(Reference.parse(self._reference))
        Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
        Path(artifact.path).write_text(manifest.model_dump_json(indent=2))
        artifact.metadata |= {"reference": self._reference, "bytes": manifest.size}

    def describe(self, seconds: float, run_id: str) -> dict[str, Any]:
        """What the manifest says of the output beside its files."""
        return {
            "stage": self.name,
            "variant": self.variant,
            "key": self.key,
            "code": self.code,
            "inputs": {name: str(reference) for name, reference in self.inputs.items()},
            "settings": self.settings,
            "seconds": round(seconds, 3),
            "mlflow_run_id": run_id,
        }


class StageCheckpoints:
    """A stage's checkpoints in the store. The curves recorded so far go with each, so that they are whole after a resume."""

    def __init__(self, store: Store, prefix: str, out: Path) -> None:
        self.prefix = prefix
        self._store = store
        self._curves = out / "metrics.jsonl"
        self._checkpoints = PrefixCheckpoints(store, prefix)

    def save(self, folder: Path, step: int) -> None:
        """Keep the folder's files, and the curves, as the checkpoint of `step`."""
        if self._curves.exists():
            shutil.copy(self._curves, folder / self._curves.name)
        self._checkpoints.save(folder, step)

    def latest(self, folder: Path) -> int | None:
        """Put the newest whole checkpoint's files into `folder` and return its step, or None where there is none."""
        step = self._checkpoints.latest(folder)
        if step is not None and (folder / self._curves.name).exists():
            shutil.move(folder / self._curves.name, self._curves)
        return step

    def within(self, name: str) -> StageCheckpoints:
        """The checkpoints of one of several trainings in the stage; they are kept apart, and deleted together."""
        return StageCheckpoints(self._store, f"{self.prefix}/{name}", self._curves.parent)


def code_version(stage: str) -> str:
    """sha256 over the sources that a stage's output depends on: its own folder and what every stage stands on (hex).

    Another stage's folder is left out, since no stage imports another: a change to `evaluate` trains nothing again.
    """
    root = Path(__file__).parents[2]
    shared = (root / "lib").rglob("*.py")
    own = [path for path in (root / stage).rglob("*") if path.suffix in {".py", ".j2"}]
    digest = hashlib.sha256()
    for path in sorted({*shared, *own}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _section(recipe: Recipe, dotted: str) -> Any:
    value: Any = recipe
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _by_digest(value: Any) -> Any:
    """Put the digest in every reference's place: what a text is called, and which bucket holds it, changes no result."""
    if isinstance(value, Mapping):
        return {name: _by_digest(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_by_digest(part) for part in value]
    match = _REFERENCE.match(value) if isinstance(value, str) else None
    return match[1] if match else value
