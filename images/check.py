"""Whether every stage and every verb can be imported here, and the code is the one that the image is labelled with.

The image's build runs it, and its health check.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Iterable
from types import ModuleType

import components
import pipeline
from components.lib.stage.code import code_of_everything


def modules() -> list[str]:
    """Return the stages, and the command line with what compiles a pipeline: `espalier schedule` and `espalier deploy` run here too."""
    return [module.name for package in (components, pipeline) for module in _inside(package)]


def _inside(package: ModuleType) -> Iterable[pkgutil.ModuleInfo]:
    return pkgutil.walk_packages(package.__path__, f"{package.__name__}.")


def main() -> int:
    """Import them all, and compare the code with ESPALIER_CODE where that is set."""
    for name in modules():
        importlib.import_module(name)
    code, expected = code_of_everything(), os.environ.get("ESPALIER_CODE") or None
    if expected not in (None, code):
        print(f"the code here is {code}, not {expected}: build the image from the sources that its label names")
        return 1
    print(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
