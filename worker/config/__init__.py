"""The settings: one frozen value, from the environment or `.env`, checked at start.

Every problem is named at once, by its variable; no value of a secret is ever shown.
"""

from __future__ import annotations

import os
from datetime import timedelta
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from worker.checks import Refused
from worker.checks.addresses import address
from worker.config.values import (
    Domains,
    Duration,
    Switch,
    domains,
    duration,
    problem,
    read,
    read_bytes,
)
from worker.credentials import MANAGED, Assertion, Credential, certificate
from worker.limits import Limits, Rate
from worker.model import InvalidSettings, OnUnknown
from worker.staging import Staging

__all__ = ["SECRETS_DIR", "Duration", "Settings", "duration"]

#: Names a directory of files, each called like a variable and holding its value: where Docker and
#: Kubernetes lay secrets.
SECRETS_DIR = "POSTROOM_SECRETS_DIR"
#: Variables of ours that are no settings: which redis-server demo and tests start.
_OTHERS = frozenset({SECRETS_DIR, "POSTROOM_REDIS_SERVER"})


class Settings(BaseSettings):
    """All settings; each is read from POSTROOM_<NAME>."""

    model_config = SettingsConfigDict(
        env_prefix="POSTROOM_", env_file=".env", env_file_encoding="utf-8", extra="ignore",
        frozen=True, hide_input_in_errors=True,
    )  # fmt: skip

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis: broker, inbox, gates")
    database_url: str | None = Field(
        None, description="postgresql+psycopg://… or sqlite:////path", repr=False
    )
    db_schema: str | None = Field(None, description="schema of the tables (PostgreSQL)")
    tenant_id: str | None = Field(None, description="directory (tenant) id of Entra")
    client_id: str | None = Field(None, description="application (client) id")
    client_secret: SecretStr | None = Field(None, description="client secret")
    client_secret_file: Path | None = Field(None, description="file that holds the secret")
    client_certificate: SecretStr | None = Field(
        None, description="private key and certificate in PEM, instead of a secret"
    )
    client_certificate_file: Path | None = Field(
        None, description="file that holds them in PEM, or a PFX"
    )
    client_certificate_password: SecretStr | None = Field(
        None, description="password of the certificate's key"
    )
    client_certificate_password_file: Path | None = Field(
        None, description="file that holds the password"
    )
    federated_token_file: Path | None = Field(
        None, description="file with the assertion of workload identity federation"
    )
    managed_identity: str | None = Field(
        None, description="Azure's identity: system, or the client id of a user-assigned one"
    )
    authority: str = Field("https://login.microsoftonline.com", description="Entra's address")
    graph_url: str = Field("https://graph.microsoft.com", description="Graph's address")
    ca_bundle: Path | None = Field(
        None,
        description="CA file for Entra and Graph; wins over REQUESTS_CA_BUNDLE and SSL_CERT_FILE",
    )
    pools: dict[str, list[str]] = Field(
        default_factory=dict, description="JSON: pool name to list of mailboxes"
    )
    mailbox_concurrency: int = Field(4, ge=1, le=4, description="requests at once per mailbox")
    mailbox_request_rate: str = Field(
        "10000/10min", description="requests of a mailbox in any such time; or off"
    )
    mailbox_message_rate: str = Field("off", description="messages of a mailbox, e.g. 30/min")
    mailbox_recipient_rate: str = Field(
        "9500/24h", description="recipients of a mailbox (Exchange allows 10000, people's own too)"
    )
    mailbox_upload_rate: str = Field("150MB/5min", description="bytes sent to a mailbox")
    tenant_external_rate: str = Field(
        "off", description="recipients outside the organisation, all mailboxes together"
    )
    internal_domains: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(), description="domains inside, comma-separated; none: those of the senders"
    )
    reserve_high: int = Field(
        5, ge=0, le=50, description="percent of each rate that is kept for priority high"
    )
    request_timeout: Duration = Field(
        timedelta(seconds=60), description="one request to Graph, in all"
    )
    lease: Duration = Field(timedelta(seconds=90), description="how long a claim is held")
    on_unknown: OnUnknown = Field(
        OnUnknown.HOLD,
        description="what may have been sent: hold, reconcile (needs Mail.Read), or resend",
    )
    settle_margin: Duration = Field(
        timedelta(seconds=300), description="a request may come so long after its token's end"
    )
    bounces: Switch = Field("on", description="reports that mail came back are read; or off")
    suppress_bounced: Switch = Field("off", description="on: bad addresses are suppressed")
    token_margin: Duration = Field(
        timedelta(seconds=300), description="a token is renewed this long before its end"
    )
    max_attempts: int = Field(6, ge=1, le=1000, description="tries of a message")
    max_failures: int = Field(
        50, ge=0, description="rejections in a row that pause a batch; 0 or off: none do"
    )
    max_age: Duration = Field(
        timedelta(hours=24), description="how long a message may wait after it became due"
    )
    secret_key: SecretStr | None = Field(
        None, description="Fernet key(s), comma-separated: encrypts the token in Redis"
    )
    redirect_to: str | None = Field(
        None, description="staging: all mail goes to this address, its recipients in the subject"
    )
    allowed_domains: Domains = Field(
        frozenset(), description="staging: comma-separated; mail to other domains is refused"
    )
    on_finished_broker: str | None = Field(
        None, description="broker of the application that on_finished calls [REDIS_URL]", repr=False
    )
    on_finished_queue: str = Field("celery", description="the queue in which it listens")
    inbox_budget: int = Field(
        256 * 1024 * 1024, ge=1024, description="bytes that may wait in the inbox"
    )

    attachment_root: Path | None = Field(
        None, description="directory below which attachments may be named by their path"
    )
    content_after: Duration | None = Field(
        None, description="contents and addresses are forgotten so long after a batch; none: never"
    )
    log_format: Literal["human", "json"] = Field(
        "human", description="logs of the workers: human, or json (one object a line)"
    )
    flower_basic_auth_file: Path | None = Field(
        None, description="file that holds NAME:PASSWORD for Flower"
    )

    smtp_senders: str = Field(
        "", description="who may send by `postroom smtp`: mailboxes, domains as @contoso.com"
    )
    smtp_user: str | None = Field(None, description="the user name that the SMTP door asks for")
    smtp_password: SecretStr | None = Field(None, description="and the password")
    smtp_password_file: Path | None = Field(None, description="file that holds the password")
    smtp_certificate_file: Path | None = Field(
        None, description="PEM with key and certificates: the SMTP door wants TLS"
    )
    smtp_size_limit: int = Field(
        35 * 1024 * 1024, ge=1024, description="bytes of a mail that the SMTP door takes"
    )

    @classmethod
    def from_env(cls, **changes: Any) -> Self:
        """The settings of this process. Raises InvalidSettings, naming every problem."""
        secrets = os.environ.get(SECRETS_DIR) or None
        if secrets and not Path(secrets).is_dir():
            raise InvalidSettings(f"{SECRETS_DIR} is no directory: {secrets}")
        try:
            return cls(_secrets_dir=secrets, **changes)
        except ValidationError as error:
            raise InvalidSettings("; ".join(problem(e) for e in error.errors())) from None

    @field_validator(
        "request_timeout", "lease", "token_margin", "settle_margin", "max_age", mode="before"
    )
    @classmethod
    def _durations(cls, value: Any) -> timedelta:
        return duration(value)

    @field_validator(
        "mailbox_request_rate", "mailbox_message_rate", "mailbox_recipient_rate",
        "mailbox_upload_rate", "tenant_external_rate",
    )  # fmt: skip
    @classmethod
    def _rates(cls, value: str) -> str:
        Rate.parse(value)
        return value.strip()

    @field_validator("max_failures", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return 0 if str(value).strip().lower() == "off" else value

    @field_validator("content_after", mode="before")
    @classmethod
    def _retention(cls, value: Any) -> timedelta | None:
        return None if value in (None, "", "off") else duration(value)

    @field_validator("authority", "graph_url")
    @classmethod
    def _https(cls, value: str) -> str:
        if not value.startswith("https://"):
            raise ValueError("must begin with https://")
        return value.rstrip("/")

    @field_validator("redirect_to")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        try:
            return address(value) if value else None
        except Refused as refused:
            raise ValueError(f"is no address: {refused.detail}") from None

    @field_validator("internal_domains", "allowed_domains", mode="before")
    @classmethod
    def _domains(cls, value: Any) -> frozenset[str]:
        return domains(value)

    @field_validator("pools")
    @classmethod
    def _lower(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        return {name: sorted({m.lower() for m in members}) for name, members in value.items()}

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.lease <= self.request_timeout:
            raise ValueError("LEASE must be longer than REQUEST_TIMEOUT")
        return self

    @classmethod
    def misspelt(cls) -> list[tuple[str, str | None]]:
        """POSTROOM_ variables that are no setting, each with the one that may be meant."""
        known = {f"POSTROOM_{name.upper()}" for name in cls.model_fields} | _OTHERS
        given = {name.upper() for name in os.environ} | {
            name.upper() for name in dotenv_values(".env", encoding="utf-8")
        }
        strange = sorted(n for n in given if n.startswith("POSTROOM_") and n not in known)
        return [(n, next(iter(get_close_matches(n, known, 1)), None)) for n in strange]

    @property
    def signs(self) -> bool:
        """Whether we sign assertions ourselves, for which this machine's clock must be right."""
        secret = self.client_secret is not None or self.client_secret_file is not None
        return not secret and (
            self.client_certificate is not None or self.client_certificate_file is not None
        )

    @cached_property
    def limits(self) -> Limits:
        """What binds every mailbox for which nothing else is said."""
        return Limits(
            slots=self.mailbox_concurrency,
            requests=Rate.parse(self.mailbox_request_rate),
            messages=Rate.parse(self.mailbox_message_rate),
            recipients=Rate.parse(self.mailbox_recipient_rate),
            upload=Rate.parse(self.mailbox_upload_rate),
            external=Rate.parse(self.tenant_external_rate),
            reserve_high=self.reserve_high,
        )

    @cached_property
    def staging(self) -> Staging:
        """What keeps this environment from writing to real people."""
        return Staging(self.redirect_to, self.allowed_domains)

    @cached_property
    def graph_scope(self) -> str:
        """The scope of the token, which follows the Graph host."""
        return f"{self.graph_url}/.default"

    def require_database_url(self) -> str:
        """The database's URL. Raises InvalidSettings where it is not set."""
        if not self.database_url:
            raise InvalidSettings(
                "POSTROOM_DATABASE_URL is not set: postgresql+psycopg://user:password@host/name"
                " or sqlite:////path/file.db"
            )
        return self.database_url

    def credential(self) -> Credential:
        """The credential for MSAL, read anew at each call, so that a changed file is seen.

        Raises InvalidSettings.
        """
        secret = read("CLIENT_SECRET", self.client_secret, self.client_secret_file)
        if secret:
            return secret
        if (found := self._certificate()) is not None:
            return found
        if self.federated_token_file is not None:
            return {"client_assertion": Assertion(self.federated_token_file)}
        if self.managed_identity:
            return {MANAGED: self.managed_identity}
        raise InvalidSettings(
            "neither POSTROOM_CLIENT_SECRET nor POSTROOM_CLIENT_CERTIFICATE (nor their _FILE "
            "forms) nor POSTROOM_FEDERATED_TOKEN_FILE nor POSTROOM_MANAGED_IDENTITY is set"
        )

    def _certificate(self) -> Credential | None:
        name, given = "CLIENT_CERTIFICATE", self.client_certificate
        content = given.get_secret_value().encode() if given is not None else None
        if content is None and self.client_certificate_file is not None:
            content = read_bytes(name, self.client_certificate_file)
        if not content:
            return None
        password = read(f"{name}_PASSWORD", self.client_certificate_password,
                         self.client_certificate_password_file)  # fmt: skip
        try:
            return certificate(content, password)
        except ValueError as error:
            raise InvalidSettings(
                f"POSTROOM_{name} cannot be read with this password: {error}"
            ) from None

    def certificate_pem(self) -> bytes | None:
        """The client certificate's PEM; None where a secret is used. Raises InvalidSettings."""
        found = self.credential()
        pem = None if isinstance(found, str) else found.get("public_certificate")
        return pem.encode() if isinstance(pem, str) else None

    def flower_login(self) -> str | None:
        """NAME:PASSWORD for Flower, where a file holds one. Raises InvalidSettings."""
        return read("FLOWER_BASIC_AUTH", None, self.flower_basic_auth_file)

    def pseudonym_key(self) -> str | None:
        """What the hashes of purged recipients are keyed with: the last, oldest SECRET_KEY."""
        keys = self.secret_key.get_secret_value().split(",") if self.secret_key else []
        return keys[-1].strip() or None if keys else None

    def smtp_secret(self) -> str | None:
        """The password of the SMTP door. Raises InvalidSettings where its file cannot be read."""
        return read("SMTP_PASSWORD", self.smtp_password, self.smtp_password_file)

    def identity(self) -> tuple[str, str]:
        """Tenant id and client id. Raises InvalidSettings, naming what is absent.

        An identity of the platform knows its own.
        """
        if self.managed_identity:
            return self.tenant_id or MANAGED, self.client_id or self.managed_identity
        absent = [
            f"POSTROOM_{name.upper()}"
            for name in ("tenant_id", "client_id")
            if not getattr(self, name)
        ]
        if absent:
            raise InvalidSettings(f"{' and '.join(absent)} must be set to send")
        return str(self.tenant_id), str(self.client_id)
