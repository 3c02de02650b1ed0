"""A shelf of versions of a model that no other test uses: the registry is shared."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from components.promote import promote as module
from tests.components.promote.given import Shelf


@pytest.fixture
def shelf(environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """No version yet; a promotion alone waits a moment only, before it knows that it is alone."""
    monkeypatch.setattr(module, "SETTLE", 0.05)
    return Shelf(f"model-{uuid.uuid4().hex}", tmp_path)
