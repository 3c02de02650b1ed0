"""The code that an output depends on: the modules that a stage's work imports, compared as code.

Comments, docstrings and formatting do not count, and neither do modules that move, log or describe numbers without making any.
The digest is of the syntax trees, so that it is the same on every machine that runs the same code.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[3]
"""The folder that holds the package `components`."""

NUMERIC = ("accelerate", "lm_eval", "numpy", "peft", "safetensors", "torch", "transformers")
"""Libraries that make numbers: another version of one that the work imports is another output."""

INERT = (
    "components.lib.errors",
    "components.lib.plugins",
    "components.lib.recipe",
    "components.lib.report_parts",
    "components.lib.settings",
    "components.lib.stage",
    "components.lib.store",
    "components.lib.tracking",
    "components.lib.training.journal",
)
"""Modules, and packages with all they hold, that change no output.

The recipe is one of them because the values of the sections that a stage reads are in its key by themselves.
"""


@dataclass(frozen=True)
class Code:
    """The code behind an output."""

    modules: Mapping[str, str]
    """sha256 of each module as code (hex), by its dotted name."""
    libraries: Mapping[str, str]
    """The version of each library that makes numbers."""

    @property
    def digest(self) -> str:
        """sha256 over the modules (hex); the libraries are not a part of it."""
        return hashlib.sha256(repr(sorted(self.modules.items())).encode()).hexdigest()


def code_of(stage: str, roots: Collection[str] = (), without: Collection[str] = ()) -> Code:
    """Return the code behind a stage's output.

    Args:
        stage: the name of the stage's folder; its `stage.py` holds `work`.
        roots: more modules whose imports count: those that the recipe names, such as a method's.
        without: modules that do not count, since the recipe does not use them.
    """
    first = f"components.{stage}.stage"
    closure = _closure([first, *roots], frozenset(without))
    modules = {name: _digest(name) for name in sorted(closure)}
    modules |= {f"{stage}/{path.name}": _bytes(path) for path in sorted((ROOT / "components" / stage).glob("*.j2"))}
    imported = {library for name in closure for library in _imports(name).libraries}
    return Code(modules, {library: _version(library) for library in sorted(imported)})


def code_of_everything() -> str:
    """sha256 over every module of `components` as code (hex): it tells whether an image holds the same code."""
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "components").rglob("*.py"))
    digests = {name: _digest(name.removesuffix(".__init__")) for name in names}
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def _closure(roots: Collection[str], without: Collection[str]) -> set[str]:
    """Return the roots and every module of `components` that they import, in functions too, directly or not."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found and name not in without and not _is_inert(name):
            found.add(name)
            waiting += _imports(name).modules
    return found


def _is_inert(module: str) -> bool:
    return any(module == inert or module.startswith(f"{inert}.") for inert in INERT)


@dataclass(frozen=True)
class _Imports:
    """The imports of a module, those for type checking left out."""

    modules: frozenset[str]
    """Of `components`."""
    libraries: frozenset[str]
    """Of those that make numbers."""


@cache
def _imports(module: str) -> _Imports:
    names = set(_imported(_tree(module)))
    ours = frozenset(found for name in names if name.startswith("components") and (found := _module(name)))
    return _Imports(ours, frozenset(name.partition(".")[0] for name in names) & frozenset(NUMERIC))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of everything imported, but for type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _imported(node)


def _module(name: str) -> str | None:
    """Return the module that an imported name is, or is in."""
    parts = name.split(".")
    for last in (len(parts), len(parts) - 1):
        module = ".".join(parts[:last])
        if _file(module):
            return module
    return None


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    """Return a module's syntax tree without docstrings; of a stage's declaration, without the declaration itself."""
    file = _file(module)
    if file is None:
        raise ModuleNotFoundError(f"there is no module {module}")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not _declares(node)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A string that stands alone computes nothing: a docstring, or one below a constant or a field.
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return tree


def _declares(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "STAGE" for to in node.targets)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _digest(module: str) -> str:
    return hashlib.sha256(_written(_tree(module)).encode()).hexdigest()


def _written(value: object) -> str:
    """Write a syntax tree out. Fields that are empty are left out: newer Pythons add some."""
    if isinstance(value, ast.AST):
        fields = ((name, field) for name, field in ast.iter_fields(value) if field not in (None, []))
        return f"{type(value).__name__}({', '.join(f'{name}={_written(field)}' for name, field in fields)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    return repr(value)


def _bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(library: str) -> str:
    """Return the library's version without the name of its build: the same code for another processor."""
    try:
        return version(library).partition("+")[0]
    except PackageNotFoundError:
        return "absent"
