"""The check of a version's files before they are served, whoever asked for it."""

from __future__ import annotations

from components.lib.errors import Refusal
from components.lib.provenance.signature import SIGNATURE, check_signature
from components.lib.store.store import Reference, Store
from components.lib.tracking.registry import Version

REQUIRED = "espalier.signature_required"
"""The tag that says whether the recipe requires a signature: `true` or `false`."""


def verify_files(reference: Reference, store: Store, signature_required: bool = False) -> str:
    """Compare every file of an artifact with its digest, and check the signature; return `unsigned` or who signed.

    Args:
        reference: the artifact, as its version was registered with it.
        store: the store that it lies in.
        signature_required: whether a signature that holds is demanded.

    Raises:
        Refusal: a file is missing, differs or was added, or the signature does not hold.
    """
    check_no_strangers(reference, store)
    signature = check_signature(reference, store, signature_required)
    store.verify(reference)
    return signature


def signature_required(version: Version) -> bool:
    """Return True if the recipe that the version was made by requires a signature."""
    return version.tags.get(REQUIRED) == "true"


def check_no_strangers(reference: Reference, store: Store) -> None:
    """Raise Refusal if the artifact holds a file that its manifest does not name: a server would read an added chat template."""
    strangers = [name for name in store.strangers(reference) if name != SIGNATURE]
    if strangers:
        raise Refusal(
            f"{reference.uri} holds {strangers[0]}, which was added after the evaluation: remove it, or run the recompression again"
        )
