"""A registered model of one tiny checkpoint, or of several that are not the same."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from components.lib.store.store import Store
from components.lib.tracking import registry, runs
from components.lib.tracking.registry import Version

Register = Callable[..., Version]


@pytest.fixture
def name(environment: dict[str, str]) -> str:
    """A registered model that no other test uses: the registry is shared."""
    return f"model-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def register(name: str, tmp_path: Path) -> Register:
    """Register a checkpoint whose files hold the given word, and give it an alias."""
    run = runs.open_parent("one", {}, {})

    def register(content: str, alias: str = "") -> Version:
        folder = tmp_path / "put" / content / "model"
        folder.mkdir(parents=True)
        for file in ("model.safetensors", "chat_template.jinja", "README.md"):
            (folder / file).write_text(content)
        reference = Store.from_environment().put_content(folder.parent, "stages/prune")
        version = registry.register_version(name, reference, run, {"espalier.verdict": "pass"})
        if alias:
            registry.set_alias(name, alias, version.version)
        return registry.version_of(name, version.version)

    return register
