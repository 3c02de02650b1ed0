"""The bill of materials of a model (ML-BOM), in CycloneDX 1.6: the release, the data and the libraries that it was made of."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

_NAMESPACE = uuid.UUID("6f4f3c0e-5b0b-5f0e-9a53-0d9a4b7f2c11")
"""Of the serial numbers: one for each digest."""
_MADE = datetime(2020, 1, 1, tzinfo=UTC)
"""The format asks for a time. A fixed one keeps the file the same if nothing changed; MLflow has the real one."""


def bill_of_materials(
    *,
    name: str,
    digest: str,
    release: Mapping[str, str | None],
    data: Mapping[str, str],
    libraries: Mapping[str, str],
    settings: Mapping[str, str],
) -> str:
    """Return the bill as JSON. The same inputs give the same bytes.

    Args:
        name: the registered model's name.
        digest: sha256 of the checkpoint's artifact.
        release: `source`, `revision`, `digest` and `license` of the release; a revision or licence that is not known is None.
        data: the sha256 of each text that the model was made with or measured on, by its field in the recipe.
        libraries: the version of each library, by its name on PyPI.
        settings: further properties of the model, such as the method and the removed layers.
    """
    parent = _release(release)
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        version=digest[:12],
        bom_ref="model",
        hashes=[_sha256(digest)],
        licenses=parent.licenses,
        pedigree=Pedigree(ancestors=[parent]),
        properties=[Property(name=f"espalier:{key}", value=value) for key, value in settings.items()],
    )
    texts = [
        Component(type=ComponentType.DATA, name=field, bom_ref=f"data:{field}", hashes=[_sha256(sha256)])
        for field, sha256 in data.items()
    ]
    packages = [
        Component(
            type=ComponentType.LIBRARY,
            name=library,
            version=version,
            bom_ref=f"library:{library}",
            purl=PackageURL("pypi", name=library.lower().replace("_", "-"), version=version),
        )
        for library, version in libraries.items()
    ]
    bom = Bom(
        serial_number=uuid.uuid5(_NAMESPACE, digest),
        metadata=BomMetaData(component=model, timestamp=_MADE),
        components=[*texts, *packages],
    )
    bom.register_dependency(model, [*texts, *packages])
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def _release(release: Mapping[str, str | None]) -> Component:
    source, revision, license_ = (release.get(key) for key in ("source", "revision", "license"))
    repository = str(source).partition("@")[0]
    of_hub = re.fullmatch(r"([\w.-]+)/([\w.-]+)", repository) and re.fullmatch(r"[0-9a-f]{40}", str(revision))
    namespace, _, name = repository.partition("/")
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=str(source),
        version=revision,
        bom_ref="release",
        hashes=[_sha256(str(release["digest"]))],
        licenses=[DisjunctiveLicense(name=license_)] if license_ else [],
        purl=PackageURL("huggingface", namespace, name, revision) if of_hub else None,
    )


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)
