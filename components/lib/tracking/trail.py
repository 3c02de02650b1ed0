"""The trail of promotions: a tag of the registered model for each, with who, when, from, to, why and the verdict."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict

from components.lib.tracking.client import client

TAG = "espalier.promotion."
"""Prefix of the tags; the time of the promotion follows."""


class Promotion(BaseModel):
    """A move of the alias `champion`."""

    model_config = ConfigDict(frozen=True)

    action: Literal["promote", "rollback"]
    by: str
    """The user, or the run that promoted by itself."""
    at: datetime
    """When it began."""
    source: str
    """The version that was champion before; empty if there was none."""
    target: str
    """The version that became champion."""
    previous: str
    """The version that the alias `previous` named before; empty if there was none."""
    why: str
    verdict: str
    """That of the target: `pass`, `fail` or `missing`."""
    signature: str
    """`unsigned`, or who signed the target's files."""
    state: Literal["begun", "done", "given up"] = "begun"

    @property
    def tag(self) -> str:
        """The name of its tag; the names of the trail, sorted, are in the order of time."""
        return f"{TAG}{self.at:%Y-%m-%dT%H-%M-%S.%fZ}"


def trail(name: str) -> list[Promotion]:
    """Return the promotions of a registered model, the oldest first; none if there is no such model."""
    try:
        tags = client().get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []
    return [Promotion.model_validate_json(tags[tag]) for tag in sorted(tags) if tag.startswith(TAG)]


def record(name: str, promotion: Promotion) -> None:
    """Write the promotion into the trail; the one of the same time is replaced."""
    client().set_registered_model_tag(name, promotion.tag, promotion.model_dump_json())


def before(name: str, version: str) -> str:
    """Return the version that was champion before this one when it was last promoted; empty if there was none."""
    found: Iterator[str] = (
        one.source
        for one in reversed(trail(name))
        if (one.action, one.state, one.target) == ("promote", "done", version) and one.source != version
    )
    return next(found, "")


def now() -> datetime:
    """Return the present time."""
    return datetime.now(UTC)


def user() -> str:
    """Return the name of the user who runs this process; a container may know none."""
    with suppress(Exception):
        return getpass.getuser()
    return "unknown"
