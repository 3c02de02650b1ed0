"""Task files of lm-eval, made self-contained: each with what it includes, its data and its code, in one folder.

    <task>.yaml                        # what it includes is merged in, and the paths below are in place of the old ones
    data/<digest>/rows.jsonl           # dataset_kwargs.data_files; the folders of dataset_path and dataset_kwargs.data_dir
    code_<digest>/utils.py             # the files that !function names, if their code may run

lm-eval is not needed to collect them. https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/task_guide.md
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from components.lib.errors import Refusal
from components.lib.given_yaml import parse_yaml

SUFFIXES = (".yaml", ".yml")


def collect(path: Path, out: Path, remote_code: bool = False) -> Path:
    """Fill the folder `out` with a task file, or with every task file in and below a folder; return `out`. Data files are links.

    Args:
        path: a task file (YAML), or a folder. In a folder, YAML files that define no task (templates, groups) are left out.
        out: an empty folder.
        remote_code: whether a task may run Python code that comes with it.

    Raises:
        Refusal: there is no task, a file that a task names is missing, or a task needs code that may not run.
    """
    files = _task_files(path.expanduser())
    names: dict[str, Path] = {}
    for file in files:
        config = _merged(file)
        if not isinstance(config.get("task"), str):
            if path.is_dir():
                continue
            raise Refusal(
                f"the task file {file} has no 'task', which names it: name a task file, or the folder of a group"
            )
        name = config["task"]
        if name in names:
            raise Refusal(f"the task files {names[name]} and {file} both define {name!r}: rename one of them")
        names[name] = file
        _Collected(file, out, remote_code).write(config)
    if not names:
        raise Refusal(f"the folder {path} has no task file: name a folder with YAML files that have a 'task'")
    return out


def _task_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}"))
    if not path.is_file():
        raise Refusal(
            f"evaluate.tasks names {path}, which is neither a file nor a folder here: check the path; a task of lm-eval "
            "is written by its name alone"
        )
    return [path]


@dataclass(frozen=True)
class _Function:
    """A value with the tag !function: `module.function`, of the file module.py in the folder or of an installed module."""

    name: str
    folder: Path


def _merged(file: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a task file's fields, those that it includes first and its own over them, as lm-eval merges them."""
    if file in seen:
        raise Refusal(f"the task file {file} includes itself: remove the include")

    class Loader(yaml.SafeLoader):
        """Reads !function without importing anything."""

    Loader.add_constructor("!function", lambda loader, node: _Function(str(node.value), file.parent))
    try:
        config = parse_yaml(file.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError) as error:
        raise Refusal(f"the task file {file} cannot be read ({' '.join(str(error).split())}): correct it") from None
    if not isinstance(config, dict):
        raise Refusal(f"the task file {file} is no mapping: see lm-eval's guide to tasks")
    merged: dict[str, Any] = {}
    included = config.pop("include", None) or []
    for name in included if isinstance(included, list) else [included]:
        part = _merged(file.parent / str(name), (*seen, file))
        part.pop("task_list", None)
        merged |= part
    return merged | config


@dataclass(frozen=True)
class _Collected:
    """A task file on its way into the folder."""

    file: Path
    out: Path
    remote_code: bool
    folders: list[Path] = field(init=False)
    """A relative path is looked for beside the file, then in the working directory, as lm-eval does."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folders", [self.file.parent, Path.cwd()])

    def write(self, config: dict[str, Any]) -> None:
        """Write the task's file, and link the files that it names."""
        config = {name: self._without_code(value) for name, value in config.items()}
        kwargs = dict(config.get("dataset_kwargs") or {})
        kwargs.pop("trust_remote_code", None)
        if "data_files" in kwargs:
            kwargs["data_files"] = self._data_files(kwargs["data_files"])
        if "data_dir" in kwargs:
            kwargs["data_dir"] = self._folder("dataset_kwargs.data_dir", str(kwargs["data_dir"]))
        source = str(config.get("dataset_path") or "")
        if "/" in source and self._found(source, Path.is_dir):
            config["dataset_path"] = self._folder("dataset_path", source)
        config |= {"dataset_kwargs": kwargs} if kwargs else {}
        text = yaml.dump(config, Dumper=_Dumper, sort_keys=True, allow_unicode=True)
        name = hashlib.sha256(config["task"].encode()).hexdigest()[:8] if "/" in config["task"] else config["task"]
        (self.out / f"{name}.yaml").write_text(text, encoding="utf-8")

    def _without_code(self, value: Any) -> Any:
        """Refuse code that may not run; put the files of code that may into the folder."""
        if isinstance(value, dict):
            if value.get("hf_evaluate") is True and not self.remote_code:
                raise self._refused_code(f"fetches the code of the metric {value.get('metric')!r}")
            return {name: self._without_code(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._without_code(part) for part in value]
        if isinstance(value, _Function):
            if not self.remote_code:
                raise self._refused_code(f"runs the Python code {value.name}")
            return self._code(value)
        return value

    def _refused_code(self, what: str) -> Refusal:
        return Refusal(f"the task file {self.file} {what}: set evaluate.remote_code to true if you trust it")

    def _code(self, function: _Function) -> _Function:
        module, _, name = function.name.rpartition(".")
        file = function.folder / f"{module.replace('.', '/')}.py"
        if not module or not file.is_file():
            return function  # of an installed module
        folder = f"code_{_digest(file)}"
        _link(file, self.out / folder / file.name)
        return _Function(f"{folder}.{file.stem}.{name}", self.out)

    def _data_files(self, given: Any) -> Any:
        if isinstance(given, dict):
            return {split: self._data_files(part) for split, part in given.items()}
        if isinstance(given, list):
            return [name for part in given for name in self._files(str(part))]
        names = self._files(str(given))
        return names[0] if len(names) == 1 else names

    def _files(self, pattern: str) -> list[str]:
        """Put the files that a path or pattern names into the folder, and return their new paths. A URL stays as it is."""
        if "://" in pattern:
            return [pattern]
        for folder in self.folders:
            if files := _matches(folder, pattern):
                return [self._put(file) for file in files]
        raise self._missing("dataset_kwargs.data_files", pattern)

    def _folder(self, name: str, given: str) -> str:
        """Put a folder of data into the folder, and return its new path."""
        found = self._found(given, Path.is_dir)
        if found is None:
            raise self._missing(name, given)
        files = [file for file in sorted(found.rglob("*")) if file.is_file()]
        digest = hashlib.sha256("".join(map(_digest, files)).encode()).hexdigest()[:12]
        for file in files:
            _link(file, self.out / "data" / digest / file.relative_to(found))
        return f"data/{digest}"

    def _put(self, file: Path) -> str:
        place = f"data/{_digest(file)}/{file.name}"
        _link(file, self.out / place)
        return place

    def _found(self, given: str, kind: Any) -> Path | None:
        return next((path for folder in self.folders if kind(path := folder / given)), None)

    def _missing(self, name: str, given: str) -> Refusal:
        return Refusal(
            f"the task file {self.file} names {given} in {name}, which is neither beside it nor in the working directory: "
            "correct the path"
        )


class _Dumper(yaml.SafeDumper):
    """Writes !function back."""


_Dumper.add_representer(_Function, lambda dumper, value: dumper.represent_scalar("!function", value.name))


def _matches(folder: Path, pattern: str) -> list[Path]:
    """Return the file of this name, or the files that match the pattern."""
    path = folder / pattern
    if path.is_file():
        return [path]
    base = Path(path.anchor) if Path(pattern).is_absolute() else folder
    return sorted(found for found in base.glob(pattern.removeprefix(path.anchor)) if found.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:12]


def _link(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        place.symlink_to(file.resolve())
