"""Find methods and transfers by their files: a new file in the folder adds one, and no other list names it."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import Any


def classes_of(package: str, folder: Path, base: type[Any]) -> dict[str, Any]:
    """Return the subclasses of `base` that the modules in `folder` define, by their `name`."""
    modules = [importlib.import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules([str(folder)])]
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    named: dict[str, Any] = {
        vars(kind)["name"]: kind for kind in kinds if issubclass(kind, base) and "name" in vars(kind)
    }
    return dict(sorted(named.items()))


def module_of(kind: type[Any]) -> str:
    """Return the module that holds the work of a method or a transfer: its file, or `work` in its folder."""
    package = importlib.util.find_spec(kind.__module__)
    in_folder = package is not None and package.submodule_search_locations is not None
    return f"{kind.__module__}.work" if in_folder else kind.__module__
