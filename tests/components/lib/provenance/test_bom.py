"""The bill of materials is valid CycloneDX, names what the model was made of, and is the same if nothing changed."""

from __future__ import annotations

import json
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from components.lib.provenance.bom import bill_of_materials

GIVEN: dict[str, Any] = {
    "name": "small",
    "digest": "a" * 64,
    "release": {"source": "org/base", "revision": "1" * 40, "digest": "b" * 64, "license": "apache-2.0"},
    "data": {"calibration.data": "c" * 64, "evaluate.perplexity.test": "d" * 64},
    "libraries": {"torch": "2.13.0", "lm_eval": "0.4.13"},
    "settings": {"method": "trsp", "removed": "layers 3, 4"},
}


def test_it_is_valid() -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill_of_materials(**GIVEN)) is None


def test_it_names_release_data_and_libraries() -> None:
    found = json.loads(bill_of_materials(**GIVEN))
    model = found["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "small")
    assert model["licenses"] == [{"license": {"name": "apache-2.0"}}]
    [release] = model["pedigree"]["ancestors"]
    assert release["purl"] == f"pkg:huggingface/org/base@{'1' * 40}"
    assert release["hashes"] == [{"alg": "SHA-256", "content": "b" * 64}]
    parts = {part["name"]: part for part in found["components"]}
    assert parts["calibration.data"]["type"] == "data"
    assert parts["lm_eval"]["purl"] == "pkg:pypi/lm-eval@0.4.13"
    [dependencies] = [one for one in found["dependencies"] if one["ref"] == "model"]
    assert len(dependencies["dependsOn"]) == 4


def test_the_same_inputs_give_the_same_bytes() -> None:
    assert bill_of_materials(**GIVEN) == bill_of_materials(**GIVEN)


def test_a_release_that_is_a_folder_has_no_address_and_no_licence() -> None:
    folder = {"source": "/models/base", "revision": None, "digest": "b" * 64, "license": None}
    text = bill_of_materials(**GIVEN | {"release": folder})
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    [release] = json.loads(text)["metadata"]["component"]["pedigree"]["ancestors"]
    assert "purl" not in release
    assert "licenses" not in release
