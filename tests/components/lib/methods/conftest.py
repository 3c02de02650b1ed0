"""The model that the tests of the methods share."""

from __future__ import annotations

import pytest
from transformers import LlamaForCausalLM

from tests.components.lib.methods.layers import teach


@pytest.fixture(scope="package")
def model() -> LlamaForCausalLM:
    """A model that counts, and whose layers 1 and 4 it can do without."""
    return teach()
