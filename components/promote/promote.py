"""Move the alias `champion` to a version with intact files, and keep the last champion as `previous`."""

from __future__ import annotations

from components.lib.errors import Refusal
from components.lib.store.store import Store
from components.lib.tracking import registry
from components.lib.tracking.registry import Version


def promote(name: str, version: str = "", force: bool = False) -> Version:
    """Make a registered version champion after checking its files against their digests.

    Args:
        name: the registered model.
        version: its version; the challenger when empty.
        force: promote a version whose verdict was fail.

    Raises:
        Refusal: there is no such version, its verdict is not pass, or a file is missing or differs.
    """
    candidate = registry.version_of(name, version) if version else _challenger(name)
    verdict = candidate.tags.get("espalier.verdict", "missing")
    if verdict != "pass" and not force:
        raise Refusal(
            f"version {candidate.version} of {name} has the verdict {verdict}: pass --force to promote it anyway"
        )
    Store.from_environment().verify(candidate.reference)
    champion = registry.aliased(name, "champion")
    if champion and champion.version != candidate.version:
        registry.set_alias(name, "previous", champion.version)
    registry.set_alias(name, "champion", candidate.version)
    registry.drop_alias(name, "challenger", candidate.version)
    return registry.version_of(name, candidate.version)


def _challenger(name: str) -> Version:
    challenger = registry.aliased(name, "challenger")
    if challenger is None:
        raise Refusal(
            f"the registered model {name!r} has no challenger: name a version (--version), or run a recompression whose rules hold"
        )
    return challenger
