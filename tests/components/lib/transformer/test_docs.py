"""docs/families.md lists every model type of transformers: supported and held by the contract, or refused with its reason."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from components.lib.errors import Refusal
from components.lib.transformer.docs import PAGE, model_types, page
from components.lib.transformer.families import FAMILIES, family_of
from components.lib.transformer.unsupported import UNSUPPORTED
from components.lib.transformer.wrappers import WRAPPERS
from tests.components.lib.transformer.wrapped import WRAPPED
from tests.components.lib.transformer.zoo import MODERN, SPECIMENS


def test_the_page_is_what_the_table_says() -> None:
    text = PAGE.read_text()
    assert page(text) == text, "run python -m components.lib.transformer.docs"


def test_the_page_names_every_type() -> None:
    text = PAGE.read_text()
    assert [model_type for model_type in model_types() if f"`{model_type}`" not in text] == []


@pytest.mark.parametrize("model_type", model_types())
def test_every_type_is_held_by_the_contract_or_refused_by_name(model_type: str) -> None:
    if model_type in WRAPPERS:
        assert model_type in {wrapped.model_type for wrapped in WRAPPED}
        assert model_type not in UNSUPPORTED
    elif model_type in FAMILIES:
        assert model_type in {specimen.model_type for specimen in (*SPECIMENS, *MODERN)}
        assert model_type not in UNSUPPORTED
    else:
        assert model_type in UNSUPPORTED, "a new type: give it a row in families.py, or a reason in unsupported.py"
        for config in ({"model_type": model_type}, default(model_type)):
            with pytest.raises(
                Refusal, match=f"'{model_type}' (is not supported, since it|wraps|is an encoder-decoder)"
            ):
                family_of(config)


def default(model_type: str) -> dict[str, object]:
    """The config that the class of a type makes of nothing; of two classes that ask for more, the type alone."""
    try:
        return CONFIG_MAPPING[model_type]().to_dict() | {"model_type": model_type}
    except (ValueError, StrictDataclassError):
        assert model_type in ("gemma4_assistant", "vision-encoder-decoder")
        return {"model_type": model_type}
