"""Every way to prove who we are, and how one is changed without a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
    pkcs12,
)
from cryptography.x509 import load_pem_x509_certificate

from tests.support import wait_until
from tests.test_spine import Service, service, simulator_options
from worker.config import Settings
from worker.model import InvalidSettings
from worker.runtime import Runtime
from worker.simulator import Simulator
from worker.tokens import TokenRefused

__all__ = ["service", "simulator_options"]

PASSWORD = b"a password of the test"


@pytest.fixture
def runtime(
    simulator: Simulator, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Runtime]]:
    """A runtime that leads to the simulator, without a credential unless one is given."""
    opened: list[Runtime] = []

    def make(**settings: Any) -> Runtime:
        for name, value in simulator.environment().items():
            if name != "POSTROOM_CLIENT_SECRET":
                monkeypatch.setenv(name, value)
        opened.append(Runtime(Settings.from_env(redis_url=redis_url, **settings)))
        return opened[-1]

    yield make
    for rt in opened:
        rt.close()


@pytest.fixture(scope="module")
def certificate() -> trustme.LeafCert:
    return trustme.CA().issue_cert("postroom.example", key_type=trustme.KeyType.RSA)


def written(directory: Path, certificate: trustme.LeafCert, form: str) -> dict[str, Path]:
    """The settings for the certificate in this form, in files."""
    pem = certificate.private_key_pem.bytes()
    key: Any = load_pem_private_key(pem, None)
    chain = [one.bytes() for one in certificate.cert_chain_pems]
    own = load_pem_x509_certificate(chain[0])
    locked = BestAvailableEncryption(PASSWORD)
    content = {
        "PEM": pem + chain[0],
        "PEM with a password": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked)
        + chain[0],
        "PFX": pkcs12.serialize_key_and_certificates(b"postroom", key, own, None, locked),
    }[form]  # fmt: skip
    (directory / "credential").write_bytes(content)
    (directory / "password").write_bytes(PASSWORD + b"\n")
    (directory / "public.pem").write_bytes(chain[0])
    return {
        "client_certificate_file": directory / "credential",
        "client_certificate_password_file": directory / "password",
    }


@pytest.mark.parametrize("form", ["PEM", "PEM with a password", "PFX"])
def test_a_certificate_serves_in_each_of_its_forms(
    form: str, runtime: Any, simulator: Simulator, certificate: trustme.LeafCert, tmp_path: Path
) -> None:
    """A password that is not needed does no harm."""
    files = written(tmp_path, certificate, form)
    simulator.settings(certificate=str(tmp_path / "public.pem"))
    rt = runtime(**files)
    assert rt.tokens.get().value
    assert rt.settings.certificate_pem().startswith(b"-----BEGIN")


@pytest.mark.parametrize("form", ["PEM with a password", "PFX"])
def test_a_wrong_password_is_one_clear_line(
    form: str, runtime: Any, certificate: trustme.LeafCert, tmp_path: Path
) -> None:
    """It names the setting, and shows neither key nor password."""
    files = written(tmp_path, certificate, form)
    files["client_certificate_password_file"].write_text("canary")
    with pytest.raises(InvalidSettings, match="POSTROOM_CLIENT_CERTIFICATE cannot be") as raised:
        runtime(**files).settings.credential()
    assert "canary" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_assertion_of_the_platform_serves_and_is_read_anew(
    runtime: Any, simulator: Simulator, tmp_path: Path
) -> None:
    """Workload identity federation: Kubernetes renews the file, Entra trusts its issuer."""
    simulator.settings(federated="https://issuer.example system:serviceaccount:mail:postroom")

    def sign(subject: str) -> None:
        claims = {
            "iss": "https://issuer.example", "sub": subject, "aud": "api://AzureADTokenExchange",
            "exp": datetime.now(UTC) + timedelta(hours=1),
        }  # fmt: skip
        (tmp_path / "token").write_text(jwt.encode(claims, "k" * 32, algorithm="HS256"))

    sign("another")
    rt = runtime(federated_token_file=tmp_path / "token")
    with pytest.raises(TokenRefused) as refused:
        rt.tokens.fresh()
    assert refused.value.code == "AADSTS70021"
    sign("system:serviceaccount:mail:postroom")
    assert rt.tokens.fresh().value


@pytest.mark.parametrize("identity", ["system", "0d4cf0a4-25dc-4f13-a6b6-6f2a59f4a4d1"])
def test_the_identity_of_the_platform_needs_no_secret(
    identity: str, runtime: Any, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Managed identity, as App Service lends it; without its header there is none."""
    simulator.settings(identity_header="of-the-platform")
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{simulator.url}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", "another")
    rt = runtime(managed_identity=identity)
    with pytest.raises(TokenRefused):
        rt.tokens.fresh()
    monkeypatch.setenv("IDENTITY_HEADER", "of-the-platform")
    token = rt.tokens.get()
    assert timedelta(minutes=58) < token.left < timedelta(minutes=61)
    assert rt.settings.identity()[1]


def test_a_secret_that_changed_in_its_file_is_taken_up(
    runtime: Any, simulator: Simulator, tmp_path: Path
) -> None:
    """At the next request, without the refusal of the old one; an absent file changes nothing."""
    file = tmp_path / "secret"
    file.write_text("wrong\n")
    rt = runtime(client_secret_file=file)
    with pytest.raises(TokenRefused, match="AADSTS7000215"):
        rt.tokens.get()
    file.unlink()
    with pytest.raises(TokenRefused, match="AADSTS7000215"):
        rt.tokens.get()
    file.write_text(simulator.client_secret + "\n")
    assert rt.tokens.get().value


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_workers_take_up_a_rotated_secret_without_a_restart(
    service: Service, tmp_path: Path
) -> None:
    """The old one ends in the middle of the service; nothing fails, and the batch ends."""
    file = tmp_path / "secret"
    file.write_text(service.simulator.client_secret)
    del service.environment["POSTROOM_CLIENT_SECRET"]
    service.environment["POSTROOM_CLIENT_SECRET_FILE"] = str(file)
    service.worker("one")
    service.wait_for_end(service.enqueue(3))
    service.simulator.settings(client_secret="the-next-one")
    service.simulator.revoke_tokens()

    batch = service.enqueue(3)
    wait_until(lambda: service.simulator.stats()["token_requests"] >= 2, "the old one is refused")
    file.write_text("the-next-one\n")

    assert service.wait_for_end(batch)["sent"] == 3


@pytest.mark.parametrize("change", [{"POSTROOM_SECRETS_DIR": "/nowhere"}], ids=["no directory"])
def test_a_directory_of_secrets_that_is_not_there_is_named(
    change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume that was not mounted is no reason to start without secrets."""
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings, match="POSTROOM_SECRETS_DIR is no directory: /nowhere"):
        Settings.from_env()


def test_settings_come_from_a_directory_of_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each file is called like a setting; the environment wins over it."""
    (tmp_path / "postroom_redis_url").write_text("redis://from-a-file:6379/0\n")
    (tmp_path / "postroom_tenant_id").write_text("from a file")
    (tmp_path / "somebody_elses").write_text("x")
    monkeypatch.setenv("POSTROOM_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("POSTROOM_TENANT_ID", "from the environment")
    settings = Settings.from_env()
    assert settings.redis_url == "redis://from-a-file:6379/0"
    assert settings.tenant_id == "from the environment"
