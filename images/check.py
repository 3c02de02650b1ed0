"""Whether every stage can be imported here, and the code is the one that the image is labelled with.

The image's build runs it, and its health check.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import components
from components.lib.stage.code import code_of_everything


def modules() -> list[str]:
    """What runs inside the container: everything but the Kubeflow faces, which are needed where a pipeline is compiled."""
    found = (module.name for module in pkgutil.walk_packages(components.__path__, "components."))
    return [name for name in found if name != "components.lib.stage.face" and not name.endswith(".component")]


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
