"""Entra's token endpoint and discovery, with its error shapes.

https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow
https://learn.microsoft.com/entra/identity-platform/reference-error-codes
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
from cryptography.x509 import load_pem_x509_certificate

from worker.simulator.settings import Settings
from worker.simulator.tls import write_private

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
GRAPH_HOSTS = (
    "graph.microsoft.com",
    "graph.microsoft.us",
    "dod-graph.microsoft.us",
    "microsoftgraph.chinacloudapi.cn",
)


class EntraError(Exception):
    """A refusal by Entra: `error`, its AADSTS number and the text after it."""

    def __init__(self, error: str, number: int, text: str) -> None:
        super().__init__(text)
        self.status = 401 if error == "invalid_client" else 400
        self.error = error
        self.number = number
        self.text = text

    def body(self, correlation_id: str) -> dict[str, Any]:
        """The JSON of the answer."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        trace_id = str(uuid.uuid4())
        return {
            "error": self.error,
            "error_description": f"AADSTS{self.number}: {self.text} Trace ID: {trace_id} "
            f"Correlation ID: {correlation_id} Timestamp: {now}",
            "error_codes": [self.number],
            "timestamp": now,
            "trace_id": trace_id,
            "correlation_id": correlation_id,
            "error_uri": f"https://login.microsoftonline.com/error?code={self.number}",
        }


class Tokens:
    """Issues bearer tokens and knows them again, over a restart too."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "token.key"
        if not self._path.exists():
            write_private(self._path, secrets.token_hex(32).encode())
        self._key = self._path.read_bytes()
        self._ends: dict[str, float] = {}

    def issue(self, settings: Settings) -> str:
        """A signed token with its end, application, tenant and roles."""
        now = int(time.time())
        granted = (
            ("Mail.Send", settings.mail_send),
            ("Mail.Read", settings.mail_read),
            ("Mail.ReadWrite", settings.mail_read_write),
        )
        claims = {
            "aud": "https://graph.microsoft.com",
            "iss": f"https://sts.windows.net/{settings.tenant_id}/",
            "iat": now,
            "nbf": now,
            "exp": now + settings.token_lifetime,
            "appid": settings.client_id,
            "tid": settings.tenant_id,
            "roles": [role for role, given in granted if given],
            "uti": secrets.token_urlsafe(16),
        }
        return jwt.encode(claims, self._key, algorithm="HS256")

    def revoke(self) -> None:
        """End every token issued so far."""
        self._key = secrets.token_hex(32).encode()
        write_private(self._path, self._key)
        self._ends.clear()

    def refusal(self, authorization: str) -> str | None:
        """Why this Authorization header is refused; None when it is good."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            return "Access token is empty."
        end = self._ends.get(token)
        if end is None:
            try:
                claims = jwt.decode(
                    token,
                    self._key,
                    algorithms=["HS256"],
                    options={"verify_aud": False, "verify_exp": False},
                )
            except jwt.InvalidTokenError:
                return "Access token validation failure. Invalid or revoked token."
            end = self._ends[token] = float(claims["exp"])
        if time.time() >= end:
            return "Lifetime validation failed, the token is expired."
        return None


def discovery(base: str, tenant: str, settings: Settings) -> dict[str, Any]:
    """The OpenID configuration of a tenant.

    Raises:
        EntraError: unknown tenant.
    """
    check_tenant(tenant, settings)
    login = f"{base}/{settings.tenant_id}/oauth2/v2.0"
    return {
        "issuer": f"{base}/{settings.tenant_id}/v2.0",
        "authorization_endpoint": f"{login}/authorize",
        "token_endpoint": f"{login}/token",
        "device_authorization_endpoint": f"{login}/devicecode",
        "jwks_uri": f"{base}/{settings.tenant_id}/discovery/v2.0/keys",
        "token_endpoint_auth_methods_supported": ["client_secret_post", "private_key_jwt"],
        "tenant_region_scope": "EU",
        "cloud_graph_host_name": "graph.windows.net",
        "msgraph_host": "graph.microsoft.com",
    }


def instances(base: str, settings: Settings) -> dict[str, Any]:
    """What /common/discovery/instance answers: this host is the only one it knows."""
    host = urlsplit(base).netloc
    return {
        "tenant_discovery_endpoint": f"{base}/{settings.tenant_id}/v2.0/"
        ".well-known/openid-configuration",
        "api-version": "1.1",
        "metadata": [{"preferred_network": host, "preferred_cache": host, "aliases": [host]}],
    }


def check_tenant(tenant: str, settings: Settings) -> None:
    """Refuse a tenant that is not the one."""
    if tenant.lower() not in (settings.tenant_id.lower(), settings.tenant_domain.lower()):
        text = f"Tenant '{tenant}' not found. Check to make sure you have the correct tenant ID."
        raise EntraError("invalid_request", 90002, text)


def grant(base: str, tenant: str, form: Mapping[str, Any], settings: Settings) -> None:
    """Pass a client credentials request, or refuse it.

    Raises:
        EntraError: as Entra refuses it.
    """
    check_tenant(tenant, settings)
    if form.get("grant_type") != "client_credentials":
        raise EntraError("unsupported_grant_type", 70003, "The grant type is not supported.")
    client = str(form.get("client_id") or "")
    if client.lower() != settings.client_id.lower():
        text = f"Application with identifier '{client}' was not found in the directory '{tenant}'."
        raise EntraError("unauthorized_client", 700016, text)
    if settings.client_disabled:
        text = f"Application '{client}'(simulator) is disabled."
        raise EntraError("unauthorized_client", 7000112, text)
    _check_scope(base, str(form.get("scope") or ""))
    if form.get("client_assertion"):
        _check_assertion(base, form, settings)
    else:
        _check_secret(client, str(form.get("client_secret") or ""), settings)


def _check_scope(base: str, scope: str) -> None:
    resource, default = scope.removesuffix(".default"), scope.endswith("/.default")
    if not default:
        text = f"The provided value for scope {scope} is not valid. It must end in /.default."
        raise EntraError("invalid_scope", 1002012, text)
    # Microsoft's SDK leaves the port out of the scope, MSAL does not.
    if urlsplit(resource).hostname not in (*GRAPH_HOSTS, urlsplit(base).hostname):
        text = f"The resource principal named {resource} was not found in the tenant."
        raise EntraError("invalid_resource", 500011, text)


def _check_secret(client: str, secret: str, settings: Settings) -> None:
    if not secret:
        text = "The request body must contain: 'client_assertion' or 'client_secret'."
        raise EntraError("invalid_client", 7000218, text)
    if not secrets.compare_digest(secret.encode(), settings.client_secret.encode()):
        text = (
            "Invalid client secret provided. Ensure the secret being sent in the request is the "
            f"client secret value, not the client secret ID, for a secret added to app '{client}'."
        )
        raise EntraError("invalid_client", 7000215, text)
    if settings.secret_expired:
        text = f"The provided client secret keys for app '{client}' are expired."
        raise EntraError("invalid_client", 7000222, text)


def _check_federated(assertion: str, trusted: str) -> None:
    """https://learn.microsoft.com/entra/workload-id/workload-identity-federation"""
    issuer, _, subject = trusted.partition(" ")
    try:
        jwt.decode(
            assertion,
            options={"verify_signature": False, "verify_aud": True, "verify_exp": True,
                     "verify_iss": True, "verify_sub": True},
            audience="api://AzureADTokenExchange", issuer=issuer, subject=subject,
        )  # fmt: skip
    except jwt.InvalidTokenError as error:
        text = f"No matching federated identity record found for presented assertion: {error}."
        raise EntraError("invalid_client", 70021, text) from None


def _check_assertion(base: str, form: Mapping[str, Any], settings: Settings) -> None:
    if form.get("client_assertion_type") != ASSERTION_TYPE:
        raise EntraError("invalid_request", 900144, "client_assertion_type is missing or unknown.")
    if settings.federated:
        _check_federated(str(form["client_assertion"]), settings.federated)
        return
    tenants = (settings.tenant_id, settings.tenant_domain)
    options: dict[str, Any] = {"require": ["aud", "exp", "iss", "sub"]}
    key: Any = ""
    if settings.certificate:
        pem = Path(settings.certificate).read_bytes()
        key = load_pem_x509_certificate(pem).public_key()
    else:
        options |= {
            "verify_signature": False,
            "verify_aud": True,
            "verify_exp": True,
            "verify_iss": True,
        }
    try:
        jwt.decode(
            str(form["client_assertion"]),
            key,
            algorithms=["RS256", "PS256"],
            audience=[f"{base}/{tenant}/oauth2/v2.0/token" for tenant in tenants],
            issuer=settings.client_id,
            subject=settings.client_id,
            options=options,  # type: ignore[arg-type]  # a plain dict for PyJWT's typed one
        )
    except jwt.InvalidTokenError as error:
        text = f"The certificate with identifier used to sign the client assertion failed: {error}."
        raise EntraError("invalid_client", 700027, text) from None
