"""TLS with a private certificate authority, kept in a directory so that a restart is trusted."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import trustme


def server_context(directory: Path) -> ssl.SSLContext:
    """A server's context for 127.0.0.1; writes `ca.pem`, the bundle clients are to trust."""
    authority = _authority(directory)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _authority(directory: Path) -> trustme.CA:
    bundle, key = directory / "ca.pem", directory / "ca.key"
    if bundle.exists() and key.exists():
        return trustme.CA.from_pem(bundle.read_bytes(), key.read_bytes())
    authority = trustme.CA()
    write_private(key, authority.private_key_pem.bytes())
    authority.cert_pem.write_to_path(bundle)
    return authority


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
