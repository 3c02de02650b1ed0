"""A signature covers every file of the checkpoint, holds for one signer alone, and is one that the standard tool verifies."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from model_signing import signing
from sigstore import oidc

from components.lib.errors import Refusal
from components.lib.provenance.signature import SIGNATURE, UNSIGNED, check_signature, check_signing, sign
from components.lib.store.store import Reference, Store
from tests.components.lib.provenance.keys import PEM, use_key, write_key


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An artifact with a checkpoint, and a file beside it that is not signed."""
    folder = tmp_path / "artifact"
    (folder / "model" / "tokenizer").mkdir(parents=True)
    for name in ("model.safetensors", "chat_template.jinja", "tokenizer/vocabulary.txt"):
        (folder / "model" / name).write_text(name)
    (folder / "verification.json").write_text("{}")
    return folder


@pytest.fixture
def reference(checkpoint: Path, store: Store) -> Reference:
    return store.put_content(checkpoint, "stages/prune")


def test_without_a_key_nothing_is_signed(reference: Reference, store: Store) -> None:
    assert sign(reference, store) == UNSIGNED
    assert store.attached(reference, SIGNATURE) is None


def test_a_signature_holds_and_says_whose_it_is(
    reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_key(monkeypatch, tmp_path, "ours")
    signed = sign(reference, store)
    assert signed.startswith("signed by key sha256:")
    assert check_signature(reference, store, required=True) == signed
    store.verify(reference)


def test_a_key_that_a_password_encrypts_signs(
    reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_key(tmp_path, "ours", password="right")
    use_key(monkeypatch, tmp_path, "ours")
    monkeypatch.setenv("ESPALIER_SIGNING_PASSWORD", "right")
    check_signing()
    assert sign(reference, store).startswith("signed by key sha256:")


@pytest.mark.parametrize("password", ["", "hunter2canary"])
def test_a_wrong_password_is_refused_before_the_run_and_not_shown(
    password: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_signing()  # no key is named
    write_key(tmp_path, "ours", password="right")
    use_key(monkeypatch, tmp_path, "ours")
    monkeypatch.setenv("ESPALIER_SIGNING_PASSWORD", password)
    with pytest.raises(Refusal, match="the signing key cannot be opened") as refused:
        check_signing()
    assert "hunter2canary" not in str(refused.value)


def test_a_checkpoint_is_signed_once(
    reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_key(monkeypatch, tmp_path, "ours")
    sign(reference, store)
    first = store.attached(reference, SIGNATURE)
    sign(reference, store)
    assert store.attached(reference, SIGNATURE) == first


def test_the_standard_tool_verifies_it_on_the_downloaded_folder(
    reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_key(monkeypatch, tmp_path, "ours")
    sign(reference, store)
    folder = store.get(reference, tmp_path / "copy", ["model"]) / "model"
    signature = tmp_path / SIGNATURE
    signature.write_text(store.attached(reference, SIGNATURE) or "")

    def verified() -> bool:
        public = str(tmp_path / "ours.pub")
        arguments = ["verify", "key", str(folder), "--signature", str(signature), "--public_key", public]
        return subprocess.run([sys.executable, "-m", "model_signing", *arguments], capture_output=True).returncode == 0

    assert verified()
    (folder / "chat_template.jinja").write_text("another")
    assert not verified()


def test_a_foreign_signature_is_refused_until_it_is_signed_again(
    reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_key(monkeypatch, tmp_path, "theirs")
    sign(reference, store)
    use_key(monkeypatch, tmp_path, "ours")
    with pytest.raises(Refusal, match="does not hold"):
        check_signature(reference, store)
    assert sign(reference, store).startswith("signed by key")


@pytest.mark.parametrize("changed", ["chat_template.jinja", "model.safetensors", "added.jinja", None])
def test_the_signature_of_other_files_is_refused(
    changed: str | None,
    checkpoint: Path,
    reference: Reference,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_key(monkeypatch, tmp_path, "ours")
    sign(reference, store)
    if changed is None:
        (checkpoint / "model" / "chat_template.jinja").unlink()
    else:
        (checkpoint / "model" / changed).write_text("another")
    other = store.put_content(checkpoint, "stages/prune")
    store.attach(other, SIGNATURE, store.attached(reference, SIGNATURE) or "")
    with pytest.raises(Refusal, match="does not hold"):
        check_signature(other, store)


def test_a_file_that_is_no_signature_is_refused(
    reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_key(monkeypatch, tmp_path, "ours")
    store.attach(reference, SIGNATURE, "{}")
    with pytest.raises(Refusal, match="does not hold"):
        check_signature(reference, store)


def test_a_signature_that_nobody_is_named_for_is_not_verified_and_does_not_do_if_one_is_required(
    reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refusal, match=r"has no signature \(model\.sig\), and one is required"):
        check_signature(reference, store, required=True)
    use_key(monkeypatch, tmp_path, "ours")
    sign(reference, store)
    monkeypatch.delenv("ESPALIER_SIGNING_PUBLIC_KEY")
    assert check_signature(reference, store) == "signed, not verified: no key or identity is named"
    with pytest.raises(Refusal, match="nothing is named to verify with"):
        check_signature(reference, store, required=True)


def test_a_certificate_signs_too(
    reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_certificates(tmp_path)
    monkeypatch.setenv("ESPALIER_SIGNING_METHOD", "pki")
    monkeypatch.setenv("ESPALIER_SIGNING_KEY", str(tmp_path / "leaf.pem"))
    monkeypatch.setenv("ESPALIER_SIGNING_CERTIFICATE", str(tmp_path / "leaf.crt"))
    monkeypatch.setenv("ESPALIER_SIGNING_CHAIN", str(tmp_path / "root.crt"))
    assert sign(reference, store).startswith("signed by certificate below sha256:")
    other = tmp_path / "other"
    other.mkdir()
    write_certificates(other)
    monkeypatch.setenv("ESPALIER_SIGNING_CHAIN", str(other / "root.crt"))
    with pytest.raises(Refusal, match="does not hold"):
        check_signature(reference, store)


@pytest.fixture
def keyless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sign with the identity of the workload. Returns the tokens that Sigstore is given, which is not asked."""
    given: list[str] = []

    def use(config: signing.Config, *, identity_token: str) -> signing.Config:
        given.append(identity_token)
        raise RuntimeError("Sigstore is not asked")

    monkeypatch.setattr(signing.Config, "use_sigstore_signer", use)
    monkeypatch.setattr(oidc, "detect_credential", lambda: None)
    monkeypatch.setenv("ESPALIER_SIGNING_METHOD", "keyless")
    monkeypatch.setenv("ESPALIER_SIGNING_SIGN", "true")
    return given


def token(audience: str = "sigstore", lasts: int = 600) -> str:
    """An OpenID Connect token, of a service account for example."""
    now = int(time.time())
    claims = {"iss": "https://issuer", "sub": "workload", "aud": audience, "iat": now - 1000, "exp": now + lasts}
    return jwt.encode(claims, "a key that nobody but the issuer has", algorithm="HS256")


def test_a_workload_signs_with_the_token_that_it_is_given(
    keyless: list[str], reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, mounted = tmp_path / "token", token()
    file.write_text(f"{mounted}\n")
    monkeypatch.setenv("ESPALIER_SIGNING_TOKEN_FILE", str(file))
    with pytest.raises(Refusal, match="Sigstore is not asked"):
        sign(reference, store)
    assert keyless == [mounted]


def test_a_token_whose_file_is_missing_is_refused(
    keyless: list[str], reference: Reference, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_SIGNING_TOKEN_FILE", "/no/token")
    with pytest.raises(
        Refusal, match="ESPALIER_SIGNING_TOKEN_FILE is '/no/token', which is no file: name a file with an"
    ):
        sign(reference, store)


@pytest.mark.parametrize("wrong", [None, token(audience="another"), token(lasts=-100), "nonsense"])
def test_a_workload_without_a_token_for_sigstore_is_refused_and_nobody_is_asked_to_log_in(
    wrong: str | None,
    keyless: list[str],
    reference: Reference,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if wrong:
        (tmp_path / "token").write_text(wrong)
        monkeypatch.setenv("ESPALIER_SIGNING_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(Refusal, match="keyless signing needs an OpenID Connect token for the audience sigstore"):
        sign(reference, store)
    assert not keyless


def test_a_key_to_verify_with_that_is_none_is_refused(
    reference: Reference, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_key(monkeypatch, tmp_path, "ours")
    sign(reference, store)
    (tmp_path / "ours.pub").write_text("no key")
    with pytest.raises(Refusal, match=r"the signature of .* cannot be verified"):
        check_signature(reference, store)


def write_certificates(folder: Path) -> None:
    """Write a root and a certificate below it that may sign code."""
    root_key, leaf_key = write_key(folder, "root"), write_key(folder, "leaf")
    root_name, leaf_name = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("root", "leaf"))
    now = datetime.now(UTC)
    for name, subject, key, authority in (("root", root_name, root_key, True), ("leaf", leaf_name, leaf_key, False)):
        usage = x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(root_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )
        if not authority:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        (folder / f"{name}.crt").write_bytes(made.sign(root_key, hashes.SHA256()).public_bytes(PEM))


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("METHOD", "gpg", "ESPALIER_SIGNING_METHOD is 'gpg'"),
        ("KEY", "/no/key", "ESPALIER_SIGNING_KEY is '/no/key', which is no file: name a file in PEM form"),
    ],
)
def test_a_wrong_variable_is_refused(
    variable: str, value: str, sentence: str, reference: Reference, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ESPALIER_SIGNING_{variable}", value)
    with pytest.raises(Refusal, match=sentence):
        sign(reference, store)
