"""The release of a test file's `specimen`, with the file's LAYERS layers, and the model that it loads as."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from components.lib.transformer.checkpoint import load_model
from tests.components.lib.transformer.zoo import Specimen, release


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, specimen: Specimen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of the specimen."""
    return release(specimen.model(request.module.LAYERS), tmp_path_factory.mktemp(specimen.name))


@pytest.fixture(scope="module")
def dense(source: Path) -> PreTrainedModel:
    """The release as it loads; left as it is."""
    return load_model(source)
