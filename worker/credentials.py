"""What proves to Entra who we are, in the forms that MSAL takes.

A secret is text. The others are mappings: a certificate with its key, an assertion that somebody
else signs (workload identity federation), or the identity that the platform lends (managed
identity). Their `repr` tells two of them apart, and the same one in two processes is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Credential = str | Mapping[str, Any]

#: The key of a managed identity's mapping; its value is SYSTEM or a client id.
MANAGED = "managed_identity"
SYSTEM = "system"


class Assertion:
    """The assertion of a file, read anew at each token request: the platform renews it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self) -> str:
        return self._file.read_text(encoding="ascii").strip()

    def __repr__(self) -> str:
        return f"Assertion({str(self._file)!r})"


def certificate(content: bytes, password: str | None) -> dict[str, str]:
    """MSAL's mapping of a certificate: PEM with key and chain, or PFX; either may have a password.

    Raises ValueError, whose text names no part of the key.
    """
    secret = password.encode() if password else None
    if b"-----BEGIN" not in content:
        return _of_pfx(content, secret)
    if secret is None:
        return {"private_key": content.decode(), "public_certificate": content.decode()}
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(content, secret)
    except TypeError:  # a password is given and the key has none
        return certificate(content, None)
    return {"private_key": _pem(key), "public_certificate": content.decode()}


def _of_pfx(content: bytes, secret: bytes | None) -> dict[str, str]:
    from cryptography.hazmat.primitives.serialization import Encoding, pkcs12

    key, own, chain = pkcs12.load_key_and_certificates(content, secret)
    if key is None or own is None:
        raise ValueError("it holds no key, or no certificate")
    certificates = [own, *chain]
    text = b"".join(one.public_bytes(Encoding.PEM) for one in certificates)
    return {"private_key": _pem(key), "public_certificate": text.decode()}


def _pem(key: Any) -> str:
    from cryptography.hazmat.primitives import serialization as s

    plain = s.NoEncryption()
    form: bytes = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, plain)
    return form.decode()
