"""Keys for signatures, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEM = serialization.Encoding.PEM


def write_key(folder: Path, name: str, password: str = "") -> ec.EllipticCurvePrivateKey:
    """Write a private key, encrypted if there is a password, and its public key."""
    encryption = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption)
    (folder / f"{name}.pem").write_bytes(private)
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return key


def use_key(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """Sign and verify with a key, which is made if it is not there."""
    if not (folder / f"{name}.pem").exists():
        write_key(folder, name)
    monkeypatch.setenv("ESPALIER_SIGNING_METHOD", "key")
    monkeypatch.setenv("ESPALIER_SIGNING_KEY", str(folder / f"{name}.pem"))
    monkeypatch.setenv("ESPALIER_SIGNING_PUBLIC_KEY", str(folder / f"{name}.pub"))
