"""How a stage runs: references in, work, a reference out, everything about it logged.

An output is named by its key: the hash of the stage, the digests of the files it reads, the settings it reads, the code of its
work and the libraries that make its numbers. A stage whose output is in the store already imports nothing heavy and does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

from pydantic import BaseModel

from components.lib.errors import StageFailed
from components.lib.recipe.loading import parse_recipe
from components.lib.recipe.schema import Recipe
from components.lib.settings import NodeSettings, ProcessSettings, StoreSettings, TrainJobSettings
from components.lib.stage.declaration import I, Job, References, Stage, read_files, stays
from components.lib.stage.events import StageEvents, reported
from components.lib.store.artifacts import File, Manifest, Reference
from components.lib.store.runs import leave_uses
from components.lib.store.store import PrefixCheckpoints, Store
from components.lib.training.journal import NoCheckpoints, Silent

_REFERENCE = re.compile(r"^s3://\S+@(sha256:[0-9a-f]{64})$")


def run_stage(stage: Stage[I], run: str, recipe: str, variant: str, references: References, show: Any) -> str:
    """Make the output of a stage, or find it, and return its reference.

    Args:
        stage: the declaration.
        run: the label that this run's stages share; it names the parent run in MLflow.
        recipe: the recipe's YAML, its texts replaced by references.
        variant: tells apart runs of one stage, such as the two controls.
        references: of the inputs.
        show: a Kubeflow artifact that is filled with the output's manifest; None for none.
    """
    with reported(f"{stage.name} {variant}".strip(), run) as report:
        parsed = parse_recipe(recipe)
        if not stage.asked(parsed, variant):
            report.finish("skipped")
            reference = str(references[stage.passes]) if stage.passes else ""
        else:
            opened = Opened(stage, run, parsed, variant, references, Store.from_environment())
            reference = opened.found or ""
            if reference:
                leave_uses(run, report.label, [reference], opened.store)
                report.finish("reused")
            elif stage.shared and (manifest := TrainJobSettings().trainjob):
                reference = opened.perform_on_nodes(manifest, recipe, report)
            else:
                reference = opened.perform(report)
        if show is not None and reference:
            _show(reference, show)
        return reference


@dataclass(frozen=True)
class Opened(Generic[I]):
    """One run of one stage, with everything its key is made of."""

    stage: Stage[I]
    run: str
    recipe: Recipe
    variant: str
    given: References
    store: Store

    @cached_property
    def references(self) -> dict[str, Reference | dict[str, Reference]]:
        """The references of the inputs that are present."""
        known = {one.name for one in fields(self.stage.inputs)}
        completed = self.stage.complete(self.given, self.recipe)
        if not set(completed) <= known:
            raise TypeError(f"the stage {self.stage.name} has no input {sorted(set(completed) - known)[0]}")
        found: dict[str, Reference | dict[str, Reference]] = {}
        for name, given in completed.items():
            if isinstance(given, Mapping):
                found[name] = {one: Reference.parse(text) for one, text in given.items() if text}
            elif given:
                found[name] = Reference.parse(given)
        return found

    @cached_property
    def flat(self) -> dict[str, Reference]:
        """The inputs by name, those of a mapping as `input/name`."""
        found: dict[str, Reference] = {}
        for name, given in self.references.items():
            found |= {f"{name}/{one}": ref for one, ref in given.items()} if isinstance(given, dict) else {name: given}
        return found

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of each input, with all its files."""
        return {name: self.store.manifest(reference) for name, reference in self.flat.items()}

    @cached_property
    def read(self) -> dict[str, Manifest]:
        """The manifest of the files that are read of each input."""
        return {
            name: read_files(manifest, [*self.stage.reads_of(_input(name)), *self.stage.later_of(_input(name))])
            for name, manifest in self.manifests.items()
        }

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The declared sections as plain data."""
        scoped = self.stage.scope(self.recipe)
        return {name: _plain(getattr(scoped, name)) for name in self.stage.sections}

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """Everything the key is a hash of."""
        code = self.stage.code(self.recipe)
        return {
            "stage": self.stage.name,
            "variant": self.variant,
            "inputs": {name: manifest.digest for name, manifest in self.read.items()},
            "settings": _by_digest(self.settings),
            "modules": dict(code.modules),
            "libraries": dict(code.libraries),
            "salt": self.stage.salt,
        }

    @cached_property
    def key(self) -> str:
        """sha256 over `made_of` (hex)."""
        return hashlib.sha256(json.dumps(self.made_of, sort_keys=True).encode()).hexdigest()

    @property
    def prefix(self) -> str:
        """The output's prefix in the store."""
        return f"stages/{self.stage.name}/{self.key}"

    @property
    def found(self) -> str | None:
        """The output's reference, if it is in the store."""
        found = self.store.find(self.prefix)
        return str(found) if found else None

    def perform(self, report: StageEvents) -> str:
        """Fetch the inputs, call the work, and store the folder `out` that it filled, the manifest last.

        On several nodes each calls this. The first one stores; the others return an empty reference.

        Raises:
            Refusal: the processes cannot share the work, which is said before anything is fetched.
        """
        from components.lib.checks import check_optimizers
        from components.lib.tracking.runs import stage_run

        report.emit("started")
        if self.stage.shared:
            processes = ProcessSettings()
            check_optimizers(
                self.stage, self.recipe, processes.count * NodeSettings().nnodes, parallel=processes.parallel
            )
        checkpoints = f"checkpoints/{self.key}"
        with tempfile.TemporaryDirectory(prefix="espalier-", dir=StoreSettings().scratch) as scratch:
            inputs = self._fetch(Path(scratch) / "inputs")
            out = Path(scratch) / "out"
            out.mkdir()
            alone = Job(
                out, Silent(), NoCheckpoints(), self.variant, self.manifests, self._several(), references=self.flat
            )
            if self.stage.shared and NodeSettings().node_rank:
                self._work(inputs, alone, "", checkpoints)
                return ""
            tags = {"sha256.key": self.key, "sha256.code": self.stage.code(self.recipe).digest}
            tags |= {f"espalier.input.{name}": str(reference) for name, reference in self.flat.items()}
            with stage_run(
                self.run, self.stage.name, self.variant, tags, self.settings, out, report.emit, self._texts()
            ) as journal:
                sent = Sent(self.store, self.prefix, out)
                job = replace(
                    alone, journal=journal, checkpoints=StageCheckpoints(self.store, checkpoints, out), send=sent
                )
                began = time.perf_counter()
                self._work(inputs, job, journal.run_id, checkpoints)
                seconds = time.perf_counter() - began
                journal.flush()
                described = self._described(seconds, journal.run_id)
                reference = str(self.store.put(out, self.prefix, described, sent.files))
                journal.leave(out, reference, seconds)
        if self.stage.resumes:
            self.store.delete(checkpoints)
        return reference

    def perform_on_nodes(self, manifest: Mapping[str, Any], recipe: str, report: StageEvents) -> str:
        """Let a TrainJob make the output, and return its reference.

        Args:
            manifest: the job's, without a name and arguments.
            recipe: the recipe's YAML.
            report: receives the job's states.
        """
        from components.lib.stage.nodes import Piece, run_on_nodes

        report.emit("started")
        piece = Piece(self.stage.name, self.variant, self.run, recipe, self.given)
        run_on_nodes(piece, self.key, manifest, report.emit)
        if not (reference := self.found):
            raise StageFailed(f"the TrainJob of {report.label} ended without an output: start the run again")
        return reference

    def _work(self, inputs: I, job: Job, run_id: str, prefix: str) -> None:
        """Call the work: in this process, or in several that share it.

        Args:
            inputs: the work's.
            job: the work's.
            run_id: of the job's journal, which another process opens anew.
            prefix: of the job's checkpoints.
        """
        recipe = self.stage.scope(self.recipe)
        processes = _processes() if self.stage.shared else None
        if processes is None:
            self.stage.work(inputs, recipe, job)
            return
        from components.lib.training.ranks import launch

        label = f"{self.stage.name} {self.variant}".strip()
        alone = replace(job, journal=Silent(), checkpoints=NoCheckpoints(), send=stays)
        launch(processes, _work_in_one_of_several, self.stage.work, inputs, recipe, alone, label, run_id, prefix)

    def _fetch(self, folder: Path) -> I:
        """Fetch the files that are read of each input, and return the inputs as the work takes them."""
        folders: dict[str, Path] = {}
        for name, reference in self.flat.items():
            names = [file.name for file in read_files(self.manifests[name], self.stage.reads_of(_input(name))).files]
            headers = self.stage.reads_headers_of(_input(name))
            get = self.store.get_headers if headers else self.store.get
            folders[name] = get(reference, folder / name, names) if names else _empty(folder / name)
        given: dict[str, Any] = {one.name: None for one in fields(self.stage.inputs)}
        for name, found in self.references.items():
            given[name] = {one: folders[f"{name}/{one}"] for one in found} if isinstance(found, dict) else folders[name]
        return self.stage.inputs(**given)

    def _texts(self) -> dict[str, Reference]:
        """The texts among the inputs, by their last names."""
        return {
            name.rpartition("/")[2]: reference for name, reference in self.flat.items() if "/texts/" in reference.uri
        }

    def _several(self) -> dict[str, dict[str, str]]:
        return {
            name: {one: self.read[f"{name}/{one}"].digest for one in found}
            for name, found in self.references.items()
            if isinstance(found, dict)
        }

    def _described(self, seconds: float, run_id: str) -> dict[str, Any]:
        """The metadata of the output's manifest."""
        return {
            "stage": self.stage.name,
            "variant": self.variant,
            "key": self.key,
            "code": self.stage.code(self.recipe).digest,
            "inputs": {name: str(reference) for name, reference in self.flat.items()},
            "settings": self.settings,
            "made_of": self.made_of,
            "began": round(time.time() - seconds, 3),
            "seconds": round(seconds, 3),
            "mlflow_run_id": run_id,
        }


def _processes() -> int | None:
    """Return how many processes to start on this machine, or None if this one does the work itself: it is alone, or one of several already."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return None
    count = ProcessSettings().count
    return count if count > 1 or NodeSettings().nnodes > 1 else None


def _work_in_one_of_several(
    work: Callable[..., None], inputs: Any, recipe: Recipe, job: Job, label: str, run_id: str, prefix: str
) -> None:
    """Call the work in a process of its own; the first of the processes has the stage's journal and checkpoints, the others have none."""
    from components.lib.training import ranks

    if not ranks.first():
        work(inputs, recipe, job)
        return
    from components.lib.tracking.journal import StageJournal

    journal = StageJournal(run_id, job.out, StageEvents(label).emit)
    checkpoints = StageCheckpoints(Store.from_environment(), prefix, job.out)
    work(inputs, recipe, replace(job, journal=journal, checkpoints=checkpoints))
    journal.flush()


class Sent:
    """Stores files of an output before the work has ended, and remembers them for the manifest."""

    def __init__(self, store: Store, prefix: str, out: Path) -> None:
        self.files: list[File] = []
        self._store, self._prefix, self._out = store, prefix, out

    def __call__(self, path: Path) -> None:
        """Store a file of the output, and delete it here."""
        self.files.append(self._store.send(self._out, self._prefix, path.relative_to(self._out).as_posix()))
        path.unlink()


class StageCheckpoints:
    """A stage's checkpoints in the store. Each holds the curves recorded so far, so that they are complete after a resume."""

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
        """Put the newest complete checkpoint's files into `folder` and return its step, or None if there is none."""
        step = self._checkpoints.latest(folder)
        if step is not None and (folder / self._curves.name).exists():
            shutil.move(folder / self._curves.name, self._curves)
        return step

    def scoped(self, name: str) -> StageCheckpoints:
        """Return the checkpoints of one of several trainings; they are kept apart, and deleted together."""
        return StageCheckpoints(self._store, f"{self.prefix}/{name}", self._curves.parent)


def _input(name: str) -> str:
    """Return the input of a flat name: `models` of `models/champion`."""
    return name.partition("/")[0]


def _show(reference: str, artifact: Any) -> None:
    """Fill a Kubeflow artifact with the output's manifest, for its user interface: the files stay in the store."""
    manifest = Store.from_environment().manifest(Reference.parse(reference))
    Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
    Path(artifact.path).write_text(manifest.model_dump_json(indent=2))
    artifact.metadata |= {"reference": reference, "bytes": manifest.size}


def _empty(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _by_digest(value: Any) -> Any:
    """Replace every reference by its digest: the name of a text, and the bucket that holds it, change no result."""
    if isinstance(value, Mapping):
        # Leave out methods and transfers that are not named, so that adding one later changes no old key.
        return {name: _by_digest(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_by_digest(part) for part in value]
    match = _REFERENCE.match(value) if isinstance(value, str) else None
    return match[1] if match else value
