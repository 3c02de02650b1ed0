"""A stage, declared once: its inputs, the recipe's sections that it reads, whether the recipe asks for it, and its work.

The Kubeflow face, the checks before a run, the keys, the estimate of the disk and `espalier why` read the declaration:

    @dataclass(frozen=True)
    class Inputs:
        model: Path = reads("model/*")
        selection: Path = reads("selection.json")

    def work(inputs: Inputs, recipe: Recipe, job: Job) -> None:
        from components.prune.prune import prune

        prune(inputs.model, inputs.selection, regularize=recipe.regularize, out=job.out, journal=job.journal)

    STAGE = Stage("prune", Inputs, work, sections=("regularize",))

A module `components.<stage>.stage` imports nothing heavy: a stage whose output is in the store already only looks for it.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from components.lib.recipe.schema import Recipe
from components.lib.settings import StoreSettings
from components.lib.stage.code import ROOT, Code, code_of
from components.lib.store.artifacts import Manifest, Reference
from components.lib.training.journal import Journal, SeveralCheckpoints

WHOLE = ("*",)
"""Every file of an artifact."""

CHECKPOINT = ("model/*", "!model/README.md")
"""A checkpoint as it is computed with and exported; its model card is left out."""

MODEL = (*CHECKPOINT, "!model/LICENSE*", "!model/NOTICE*", "!model/USE_POLICY*")
"""The files of a checkpoint that its answers depend on."""

TOKENIZER = (*MODEL, "!*.safetensors", "!*.index.json", "!model/generation_config.json")
"""A checkpoint's tokenizer and config."""

References = Mapping[str, str | Mapping[str, str]]
"""References by input; the input of several artifacts has a mapping of its own. An empty reference is an absent input."""


class Declared(Protocol):
    """A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


I = TypeVar("I", bound=Declared)


def reads(*patterns: str, headers: bool = False, later: tuple[str, ...] = ()) -> Any:
    """Declare an input and the files of it that the work reads: no other file is fetched, or changes the key.

    Args:
        patterns: names with wildcards; one that begins with ! excludes.
        headers: whether only the headers of safetensors files are read: the tensors are not fetched.
        later: names with wildcards of files that the work fetches itself, one by one, by `Job.fetch`.
    """
    return field(metadata={"reads": patterns or WHOLE, "headers": headers, "later": later}, kw_only=True)


def reads_windows() -> Any:
    """Declare the calibration windows as a training reads them: those in files for trainings alone are fetched when it comes to them."""
    return reads("windows.safetensors", "training.json", later=("training-*.safetensors",))


@contextmanager
def _one_file(reference: Reference, name: str) -> Iterator[Path]:
    """Fetch one file of an artifact, yield its path, and delete it."""
    from components.lib.store.store import Store

    with TemporaryDirectory(prefix="espalier-", dir=StoreSettings().scratch) as scratch:
        yield Store.from_environment().get(reference, Path(scratch) / "fetched", [name]) / name


def stays(path: Path) -> None:
    """Leave a file in its folder, to be stored with the others."""


@dataclass(frozen=True)
class Job:
    """The arguments of a work beside its inputs and the recipe."""

    out: Path
    """An empty folder to fill: the stage's output."""
    journal: Journal
    checkpoints: SeveralCheckpoints
    variant: str
    manifests: Mapping[str, Manifest]
    """The manifest of each input, with all its files."""
    digests: Mapping[str, Mapping[str, str]]
    """For each input of several artifacts, the digest of the files that are read of each."""
    references: Mapping[str, Reference] = field(default_factory=dict)
    """The reference of each input."""
    send: Callable[[Path], None] = stays
    """Stores a finished file of `out` at once and deletes it here, for outputs that are larger than the disk."""

    def fetch(self, name: str) -> Callable[[str], AbstractContextManager[Path]]:
        """Return the function that fetches one file of an input, yields its path, and deletes it."""
        return partial(_one_file, self.references[name])


def _as_given(references: References, recipe: Recipe) -> References:
    return references


def _always(recipe: Recipe, variant: str) -> bool:
    return True


def _none(recipe: Recipe) -> Collection[str]:
    return ()


@dataclass(frozen=True)
class Stage(Generic[I]):
    """A stage whose output lies in the store under a key."""

    name: str
    """The name of its folder."""
    inputs: type[I]
    """A dataclass with a field for each input: a `Path`, `Path | None`, or a mapping of paths (see `reads`)."""
    work: Callable[[I, Recipe, Job], None]
    """Fills `job.out`. The recipe that it is given has the declared sections and no other."""
    sections: tuple[str, ...] = ()
    """The sections of the recipe that the output depends on."""
    without: tuple[str, ...] = ()
    """Fields of these sections, as `section.field`, that it does not depend on: the work sees their defaults."""
    asked: Callable[[Recipe, str], bool] = _always
    """Whether the recipe asks for the stage, in this variant."""
    passes: str = ""
    """The input that becomes the output if the recipe does not ask for the stage; none if empty."""
    resumes: bool = False
    """Whether the work resumes from checkpoints after it was killed."""
    shared: bool = False
    """Whether several processes may share the work, one for each device: the first one alone fills `out`."""
    leaves_checkpoint: bool = False
    """Whether the output holds a model, which takes about as much room as the release."""
    complete: Callable[[References, Recipe], References] = _as_given
    """Adds the inputs that the recipe names, such as texts, and drops those it does without."""
    modules: Callable[[Recipe], Collection[str]] = _none
    """Modules of the work that the recipe names, such as a method's: they are imported by name."""
    unused: Callable[[Recipe], Collection[str]] = _none
    """Modules that the work imports and this recipe does not use."""
    salt: int = 0
    """Raised by hand to make every output of the stage again."""

    def code(self, recipe: Recipe) -> Code:
        """Return the code behind the output."""
        return code_of(self.name, tuple(self.modules(recipe)), tuple(self.unused(recipe)))

    def scope(self, recipe: Recipe) -> Recipe:
        """Return the recipe as the work may see it: any other section is missing, so that none is read undeclared."""
        values = {name: getattr(recipe, name) for name in self.sections}
        for dotted in self.without:
            section, _, name = dotted.partition(".")
            default = type(values[section]).model_fields[name].get_default(call_default_factory=True)
            values[section] = values[section].model_copy(update={name: default})
        scoped = Recipe.model_construct(**values)
        for name in set(Recipe.model_fields) - set(self.sections):
            scoped.__dict__.pop(name, None)
        return scoped

    def reads_of(self, name: str) -> tuple[str, ...]:
        """Return the patterns of the files that are read of an input."""
        return self._field(name)["reads"]

    def later_of(self, name: str) -> tuple[str, ...]:
        """Return the patterns of the files of an input that the work fetches itself."""
        return self._field(name)["later"]

    def reads_headers_of(self, name: str) -> bool:
        """Return whether only the headers of an input's safetensors files are read."""
        return self._field(name)["headers"]

    def _field(self, name: str) -> Mapping[str, Any]:
        return next(one.metadata for one in fields(self.inputs) if one.name == name)

    def run(
        self, run: str, recipe: str, *, variant: str = "", show: Any = None, **references: str | Mapping[str, str]
    ) -> str:
        """Make the output, or find it, and return its reference; see `components.lib.stage.run`."""
        from components.lib.stage.run import run_stage

        return run_stage(self, run, recipe, variant, references, show)


def declared_stages() -> dict[str, Stage[Any]]:
    """Return every stage with a key, by the name of its folder."""
    files = sorted((ROOT / "components").glob("*/stage.py"))
    return {file.parent.name: importlib.import_module(f"components.{file.parent.name}.stage").STAGE for file in files}


def read_files(manifest: Manifest, patterns: Collection[str]) -> Manifest:
    """Return the manifest of the files that the patterns name; it may hold none."""
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]

    def named(name: str, among: Collection[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in among)

    files = tuple(file for file in manifest.files if named(file.name, wanted) and not named(file.name, unwanted))
    return manifest.model_copy(update={"files": files})
