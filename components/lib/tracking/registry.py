"""The MLflow model registry: a version for each checkpoint, its tags and its aliases."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.lib.errors import Refusal, Unavailable
from components.lib.store.store import Reference
from components.lib.tracking.client import client, experiment_id
from components.lib.tracking.runs import DIGITS

log = logging.getLogger(__name__)

DIGEST = "sha256.checkpoint"
"""The tag with the checkpoint's digest; tags in words are called `espalier.*`."""

COMPARED = "sha256.compared_with"
"""The tag with the digest of the champion that the version was compared with; ANY or NONE."""
ANY = "any"
"""No rule compares with a champion."""
NONE = "none"
"""There was no champion."""

ITEM = "sha256.item"
"""Prefix of the tag that names, with an item's key, a watched item for which the version was made; it may be made for several."""

_ABSENT = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
"""The registry's error codes for an unknown model, version or alias."""


@dataclass(frozen=True)
class Version:
    """A registered model version that Espalier made."""

    name: str
    version: str
    source: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @property
    def reference(self) -> Reference:
        """The artifact that holds the version's checkpoint."""
        text = self.tags.get("espalier.reference")
        if not text:
            raise Refusal(
                f"version {self.version} of {self.name} has no tag espalier.reference: it was not registered by espalier"
            )
        return Reference.parse(text)


def aliased(name: str, alias: str) -> Version | None:
    """The version that the alias names, or None if the alias or the model does not exist. Raises if the server does not answer."""
    try:
        found = client().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in _ABSENT:
            return None
        raise
    return version_of(found.name, str(found.version))


def version_of(name: str, version: str) -> Version:
    """The version with its aliases.

    Raises:
        Refusal: there is no such version.
    """
    try:
        found = client().get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        raise Refusal(f"the registry has no version {version} of {name}: {_versions_known(name)}") from None
    return _version(found)


def find_version(address: str) -> Version:
    """The version behind `NAME@alias` or `NAME@number`, such as `my-model@champion`.

    Raises:
        Refusal: it is written otherwise, or there is no such model, alias or version.
    """
    name, _, which = address.rpartition("@")
    if not name or not which:
        raise Refusal(f"{address!r} names no version: write NAME@alias, such as NAME@champion, or NAME@number")
    if which.isdecimal():
        return version_of(name, which)
    found = aliased(name, which)
    if found is None:
        raise Refusal(f"the registered model {name!r} has no alias {which!r}: {_versions_known(name)}")
    return found


def register_version(name: str, reference: Reference, run_id: str, tags: Mapping[str, str]) -> Version:
    """Register the checkpoint under `name`, or update the tags of the version that holds it already.

    A version is identified by its checkpoint's digest, and by the watched item for which it is made, if the tags name one: the same
    files registered again are the same version, and an item has one version. Runs that register at the same time cannot all pass:
    MLflow numbers the versions, each run looks again after creating one, and all but the oldest delete their own.

    Raises:
        Unavailable: another checkpoint is registered for the item, because another watcher took the item over from this run.
    """
    source = f"{reference.uri}/model"
    try:
        client().create_registered_model(name)
    except MlflowException:
        log.debug("the model %s is registered already", name)
    evidence = {**tags, "espalier.reference": str(reference), DIGEST: reference.digest}
    made = None
    oldest = _holder(name, evidence)
    if oldest is None:
        made = client().create_model_version(name, source, run_id=run_id, tags=evidence)
        oldest = _holder(name, evidence) or _version(made)
    if made is not None and str(made.version) != oldest.version:
        client().delete_model_version(name, str(made.version))
    if oldest.tags.get(DIGEST) != reference.digest:
        raise Unavailable(
            f"the run {oldest.tags.get('espalier.run', '')} registered version {oldest.version} of {name} for the same watched release "
            "while this run worked, so this run registers nothing: use that version"
        )
    tag_version(oldest, evidence)
    return version_of(name, oldest.version)


def versions(name: str) -> list[Version]:
    """Every version of `name` with its aliases, oldest first; none if no model has this name."""
    found = _search(f"name = '{name}'")
    aliases: dict[str, list[str]] = {}
    if found:
        for alias, version in client().get_registered_model(name).aliases.items():
            aliases.setdefault(str(version), []).append(alias)
    # A search gives no aliases.
    made = [replace(_version(one), aliases=tuple(sorted(aliases.get(str(one.version), ())))) for one in found]
    return sorted(made, key=lambda one: int(one.version))


def every_version() -> list[Version]:
    """Every version of every registered model, without aliases, in no order."""
    return list(map(_version, _search("")))


def is_model(name: str) -> bool:
    """Return whether a model is registered under the name."""
    try:
        client().get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        return False
    return True


def _search(filter_string: str) -> list[ModelVersion]:
    """Return every version that the filter names, page by page."""
    found: list[ModelVersion] = []
    token = None
    while token != "":
        page = client().search_model_versions(filter_string or None, page_token=token)
        found += page
        token = page.token or ""
    return found


def _holder(name: str, evidence: Mapping[str, str]) -> Version | None:
    """The oldest version of `name` for an item of the evidence, if it holds another checkpoint; else the oldest that holds this one."""
    holder = None
    for tag in [*(tag for tag in evidence if tag.startswith(f"{ITEM}.")), DIGEST]:
        found = map(_version, _search(f"name = '{name}' and tags.`{tag}` = '{evidence[tag]}'"))
        holder = min(found, key=lambda one: int(one.version), default=None)
        if holder and holder.tags.get(DIGEST) != evidence[DIGEST]:
            break
    return holder


def of_run(name: str, run: str) -> Version:
    """The version that the run registered last. Raises Refusal if there is none."""
    found = [one for one in versions(name) if one.tags.get("espalier.run") == run]
    if not found:
        raise Refusal(f"the run {run} registered no version of {name}, or another run registered the same one since")
    return found[-1]


def made_for(name: str, key: str) -> Version | None:
    """The version of `name` that was made for the watched item with this key, or None."""
    found = client().search_model_versions(f"name = '{name}' and tags.`{ITEM}.{key}` = 'made'")
    return _version(found[0]) if found else None


def made_of_revision(name: str, revision: str) -> Version | None:
    """The newest version of `name` that was made of the release at this revision, or of a folder with this digest; or None."""
    for tag in ("espalier.revision", "sha256.release"):
        found = client().search_model_versions(f"name = '{name}' and tags.`{tag}` = '{revision}'")
        if found:
            return _version(max(found, key=lambda one: int(one.version)))
    return None


def tag_version(version: Version, tags: Mapping[str, str]) -> None:
    """Set tags of a registered version."""
    for key, value in tags.items():
        client().set_model_version_tag(version.name, version.version, key, value)


def describe(version: Version, text: str) -> None:
    """Set the description of a registered version, Markdown that MLflow's page shows, unless it is that already."""
    if client().get_model_version(version.name, version.version).description != text:
        client().update_model_version(version.name, version.version, text)


def set_alias(name: str, alias: str, version: str) -> None:
    """Point the alias at the version. Do nothing if it has the alias already, because webhooks would fire again."""
    present = aliased(name, alias)
    if present is None or present.version != version:
        client().set_registered_model_alias(name, alias, version)


def drop_alias(name: str, alias: str, version: str) -> None:
    """Delete the alias if it names this version."""
    present = aliased(name, alias)
    if present and present.version == version:
        client().delete_registered_model_alias(name, alias)


def log_model_evidence(
    name: str, run_id: str, tags: Mapping[str, str], measured: Mapping[str, tuple[float, str, str]]
) -> str:
    """Create a LoggedModel that links each metric to the data set it was measured on, and return its id.

    Args:
        name: the registered model's name.
        run_id: the run that measured.
        tags: tags of the LoggedModel.
        measured: metric name → (value, data set's name, data set's digest).
    """
    model = client().create_logged_model(
        experiment_id(), name=name, source_run_id=run_id, tags=dict(tags), model_type="transformers-checkpoint"
    )
    for metric, (value, dataset, digest) in measured.items():
        client().log_metric(
            run_id, metric, value, model_id=model.model_id, dataset_name=dataset, dataset_digest=digest[:DIGITS]
        )
    client().finalize_logged_model(model.model_id, "READY")
    return model.model_id


def _version(found: ModelVersion) -> Version:
    return Version(found.name, str(found.version), found.source, tuple(sorted(found.aliases)), dict(found.tags))


def _versions_known(name: str) -> str:
    """Name the versions there are, each with its aliases: "it has 1 (previous), 2"."""
    found = versions(name)
    told = [f"{one.version} ({', '.join(one.aliases)})" if one.aliases else one.version for one in found]
    return f"it has {', '.join(told)}" if told else "no model is registered under that name"
