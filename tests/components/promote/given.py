"""Registered versions to promote: tiny checkpoints that load and generate, in a real store and a real registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from components.lib.store import s3
from components.lib.store.store import Reference, Store
from components.lib.tracking import registry, runs
from components.lib.tracking.registry import Version
from tests.components.lib.transformer.zoo import Specimen, release

ALIASES = ("champion", "previous", "challenger")


@dataclass
class Shelf:
    """The versions of one registered model, each with a checkpoint of its own."""

    name: str
    folder: Path
    run: str = field(default_factory=lambda: runs.open_parent("one", {}, {}))

    def add(self, verdict: str | None = "pass", challenger: bool = False, **tags: str) -> Version:
        """Register one more version with a tiny Llama, and make it challenger if asked."""
        number = len(registry.versions(self.name)) + 1
        artifact = self.folder / str(number)
        release(Specimen("llama", "llama").model(layers=2, seed=number), artifact / "model")
        reference = Store.from_environment().put_content(artifact, "stages/prune")
        told = tags | ({"espalier.verdict": verdict} if verdict else {})
        version = registry.register_version(self.name, reference, self.run, told)
        if challenger:
            registry.set_alias(self.name, "challenger", version.version)
        return version

    def aliases(self) -> dict[str, str]:
        """The versions that bear an alias."""
        found = {alias: registry.aliased(self.name, alias) for alias in ALIASES}
        return {alias: version.version for alias, version in found.items() if version}


def put(reference: Reference, name: str, body: bytes) -> None:
    """Replace or add one object of an artifact."""
    bucket, prefix = s3.split(reference.uri)
    s3.client(s3.PATIENT).put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=body)


def read(reference: Reference, name: str) -> bytes:
    bucket, prefix = s3.split(reference.uri)
    return s3.client(s3.PATIENT).get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()


def delete(reference: Reference, name: str) -> None:
    bucket, prefix = s3.split(reference.uri)
    s3.client(s3.PATIENT).delete_object(Bucket=bucket, Key=f"{prefix}/{name}")
