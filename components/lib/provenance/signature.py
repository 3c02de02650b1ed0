"""The OpenSSF signature of a checkpoint, `model.sig`, beside its folder `model/`.

    sign(reference, store)                      # as ESPALIER_SIGNING_* say
    check_signature(reference, store)           # "unsigned", or who signed

It covers every file of the folder: weights, configuration, tokenizer, chat template, card. It is made over the digests in the
artifact's manifest, so nothing is downloaded for it; `model_signing verify` checks it against a downloaded folder just as well.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from components.lib.errors import Refusal
from components.lib.settings import SigningSettings
from components.lib.store.store import Manifest, Reference, Store

if TYPE_CHECKING:
    from model_signing.manifest import Manifest as SignedManifest

SIGNATURE = "model.sig"
FOLDER = "model"
"""The part of the artifact that is signed: the checkpoint."""
UNSIGNED = "unsigned"
SIGNED_BY = "signed by"
"""The beginning of the words for a signature that holds."""


class Digests:
    """The digests of an artifact's manifest, in the place of model-signing's hashing of a folder."""

    def __init__(self, manifest: Manifest) -> None:
        """Take the files of the checkpoint."""
        self._files = {
            str(PurePosixPath(file.name).relative_to(FOLDER)): file.sha256
            for file in manifest.files
            if PurePosixPath(file.name).is_relative_to(FOLDER)
        }

    def hash(self, model_path: Any, *, files_to_hash: Iterable[Any] | None = None) -> SignedManifest:
        """Return the manifest that model-signing would make of the folder."""
        from model_signing import manifest

        kind = manifest.SerializationType.from_args({"method": "files", "hash_type": "sha256", "allow_symlinks": False})
        digests = {
            name: manifest.hashing.Digest("sha256", bytes.fromhex(sha256)) for name, sha256 in self._files.items()
        }
        return manifest.Manifest(FOLDER, [kind.new_item(name, digest) for name, digest in digests.items()], kind)

    def add_ignored_paths(self, *, model_path: Any, paths: Iterable[Any]) -> None:
        """Ignore no path: a signature that leaves a file out does not cover the whole folder."""


def check_signing() -> None:
    """Raise Refusal if the key that ESPALIER_SIGNING_* name cannot be opened: it is needed at the end of a run, and known at its start."""
    settings = signing_settings()
    if settings.method != "keyless" and settings.key:
        with _explained("the signing key cannot be opened"):
            _signer(settings)


def sign(reference: Reference, store: Store) -> str:
    """Sign the checkpoint if ESPALIER_SIGNING_* name a key or an identity, and return what `check_signature` returns.

    The signature of an artifact that is signed already is replaced if it does not hold.

    Raises:
        Refusal: a variable is wrong, a file cannot be read, or Sigstore does not sign.
    """
    settings = signing_settings()
    if not (settings.sign if settings.method == "keyless" else settings.key):
        return check_signature(reference, store)
    if store.attached(reference, SIGNATURE) is not None:
        # One that does not hold was made by another key: the manifest is that of the reference.
        with suppress(Refusal):
            return check_signature(reference, store)
    with tempfile.TemporaryDirectory(prefix="espalier-") as scratch, _explained("the checkpoint cannot be signed"):
        signature = Path(scratch) / SIGNATURE
        config = _signer(settings).set_hashing_config(Digests(store.manifest(reference)))
        config.sign(Path(scratch), signature)
        store.attach(reference, SIGNATURE, signature.read_text())
    return check_signature(reference, store)


def check_signature(reference: Reference, store: Store, required: bool = False) -> str:
    """Return `unsigned`, or who signed the checkpoint; a signature that nothing is named to verify with is `not verified`.

    The digests of the artifact's manifest are compared: whether the files have these digests, `Store.verify` or `Store.get` tells.

    Args:
        reference: the artifact.
        store: the store that it lies in.
        required: whether a signature that holds is demanded.

    Raises:
        Refusal: the signature is not of these files, or not of the key or identity that ESPALIER_SIGNING_* name; or it is
            required, and there is none or nothing to verify it with.
    """
    text = store.attached(reference, SIGNATURE)
    if text is None:
        if required:
            raise Refusal(
                f"{reference.uri} has no signature ({SIGNATURE}), and one is required: name a key (ESPALIER_SIGNING_METHOD), "
                "and register it again"
            )
        return UNSIGNED
    settings = signing_settings()
    with _explained(f"the signature of {reference.uri} cannot be verified"):
        verifier = _verifier(settings)
    if verifier is None:
        if required:
            raise Refusal(
                f"{reference.uri} has a signature that nothing is named to verify with, and it is required: "
                "set ESPALIER_SIGNING_METHOD, and the public key, the chain, or the identity and its issuer"
            )
        return "signed, not verified: no key or identity is named"
    with tempfile.TemporaryDirectory(prefix="espalier-") as scratch:
        signature = Path(scratch) / SIGNATURE
        signature.write_text(text)
        with _explained(f"the signature of {reference.uri} does not hold"):
            verifier.set_hashing_config(Digests(store.manifest(reference))).verify(Path(scratch), signature)
    return _signer_in_words(settings)


def signing_settings() -> SigningSettings:
    """Read ESPALIER_SIGNING_*. Raises Refusal if a value is wrong."""
    try:
        settings = SigningSettings()
    except ValidationError as error:
        fault = error.errors()[0]
        name = f"ESPALIER_SIGNING_{str(fault['loc'][0]).upper()}"
        raise Refusal(f"{name} is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}") from None
    if settings.method == "pki" and settings.key and not settings.certificate:
        raise Refusal("ESPALIER_SIGNING_CERTIFICATE is not set: name the certificate of ESPALIER_SIGNING_KEY")
    return settings


def _need_files(settings: SigningSettings, *names: str) -> None:
    """Raise Refusal if one of the named files is missing: one that verifies has no private key."""
    for name in names:
        path: Path | None = getattr(settings, name)
        if path is not None and not path.is_file():
            content = "with an OpenID Connect token" if name == "token_file" else "in PEM form"
            raise Refusal(f"ESPALIER_SIGNING_{name.upper()} is {str(path)!r}, which is no file: name a file {content}")


def _signer(settings: SigningSettings) -> Any:
    _need_files(settings, "key", "certificate", "chain", "token_file")
    from model_signing import signing

    config: Any = signing.Config()
    if settings.method == "keyless":
        # Without a token model-signing would ask a person to log in, and a stage would wait for ever.
        return config.use_sigstore_signer(identity_token=_identity_token(settings))
    if settings.method == "pki":
        chain = [settings.chain] if settings.chain else []
        return config.use_certificate_signer(
            private_key=settings.key, signing_certificate=settings.certificate, certificate_chain=chain
        )
    # The library takes a string and hands it on to one that takes bytes alone.
    password: Any = settings.password.get_secret_value().encode() if settings.password else None
    return config.use_elliptic_key_signer(private_key=settings.key, password=password)


def _identity_token(settings: SigningSettings) -> str:
    """Return the OpenID Connect token that the workload is given. Raises Refusal if there is none, or it is none for Sigstore."""
    from sigstore.oidc import IdentityError, IdentityToken, detect_credential

    try:
        token = settings.token_file.read_text().strip() if settings.token_file else detect_credential()
        if token:
            IdentityToken(token)  # before any server is asked
            return token
        fault = "this process has no identity"
    except IdentityError as error:
        fault = " ".join(str(error).split())
    raise Refusal(
        f"keyless signing needs an OpenID Connect token for the audience sigstore ({fault}): name its file in "
        "ESPALIER_SIGNING_TOKEN_FILE, or run in a CI system that gives one"
    )


def _verifier(settings: SigningSettings) -> Any | None:
    """Return the verifier that is named; None if none is."""
    _need_files(settings, "public_key", "chain")
    from model_signing import verifying

    config = verifying.Config()
    if settings.method == "key" and settings.public_key:
        return config.use_elliptic_key_verifier(public_key=settings.public_key)
    if settings.method == "pki" and settings.chain:
        return config.use_certificate_verifier(certificate_chain=[settings.chain])
    if settings.method == "keyless" and settings.identity and settings.issuer:
        return config.use_sigstore_verifier(identity=settings.identity, oidc_issuer=settings.issuer)
    return None


def _signer_in_words(settings: SigningSettings) -> str:
    if settings.method == "keyless":
        return f"{SIGNED_BY} {settings.identity}"
    kind, path = ("key", settings.public_key) if settings.method == "key" else ("certificate below", settings.chain)
    assert path is not None, "the verifier was made of it"
    return f"{SIGNED_BY} {kind} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn every error of the signing libraries into a Refusal: they raise many kinds, and none may count as a signature."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        reason = " ".join(f"{error or type(error).__name__}".split())[:300]
        raise Refusal(
            f"{what} ({reason}): check ESPALIER_SIGNING_*, or register the version again with the key that is trusted"
        ) from error
