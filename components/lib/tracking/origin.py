"""Where a run comes from, as MLflow's pages show it: the program, its version, the commit of its code, the user."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from components.lib.settings import StoreSettings
from components.lib.stage.code import ROOT
from components.lib.tracking.trail import user


@cache
def commit() -> str:
    """Return the commit of the code: of the source folder, or of the image (ESPALIER_COMMIT); empty if neither is known."""
    if (ROOT / "pyproject.toml").is_file() and (ROOT / ".git").exists():
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.strip()
    return StoreSettings().commit or ""


@cache
def program() -> str:
    """Return the program with its version: `espalier 0.1.0`."""
    try:
        return f"espalier {version('espalier')}"
    except PackageNotFoundError:
        return "espalier"


def source_tags() -> dict[str, str]:
    """Return the tags that fill the columns Source, Version and User of MLflow's table of runs."""
    tags = {"mlflow.source.name": program(), "mlflow.source.type": "LOCAL", "mlflow.user": user()}
    return tags | ({"mlflow.source.git.commit": commit()} if commit() else {})
