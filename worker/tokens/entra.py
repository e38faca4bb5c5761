"""Token requests to Entra, in MSAL's words and over httpx."""

from __future__ import annotations

import logging
import queue
import ssl
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import httpx
import msal

from worker.credentials import MANAGED, SYSTEM, Credential
from worker.policy import retry_after

# It logs answers that it cannot read, and a token may lie in one.
logging.getLogger("msal").setLevel(logging.CRITICAL)

HTTP_TIMEOUT = 10.0  # seconds, for each of connecting, writing, reading
IN_ALL = 20.0  # seconds for a whole answer, however slowly it drips
MOST = 256 * 1024  # bytes of an answer
#: No token counts for longer: no database could tell when it ends.
LONGEST = timedelta(days=3650)
#: First and longest wait after a refusal, and after a failure that passes by itself.
REFUSED = (timedelta(seconds=30), timedelta(minutes=15))
PASSING = (timedelta(seconds=1), timedelta(seconds=30))
#: Entra's own words for "later"; all others mean the configuration. Numbers are for people:
#: https://learn.microsoft.com/entra/identity-platform/reference-error-codes
_PASSING_ERRORS = frozenset({"temporarily_unavailable", "server_error", "slow_down"})


class FetchError(Exception):
    """No token came; `waits`: the first and the longest wait before the next request."""

    def __init__(self, code: str, detail: str, waits: tuple[timedelta, timedelta]) -> None:
        self.code = code
        self.detail = detail
        self.waits = waits
        super().__init__(code)


class Entra:
    """Token requests by MSAL. Not for two threads at once: `Tokens` holds its mutex."""

    def __init__(
        self,
        credential: Credential,
        authority: str,
        tenant_id: str,
        client_id: str,
        scope: str,
        ca_bundle: str | None,
    ) -> None:
        self._authority = f"{authority.rstrip('/')}/{tenant_id}"
        self._client_id = client_id
        self._credential = credential
        self._scope = scope
        self._ca_bundle = ca_bundle
        self._http: _HttpForMsal | None = None
        self._app: Any = None
        self._http_cache: dict[str, Any] = {}

    def fetch(self) -> tuple[str, timedelta]:
        """A new token and its lifetime from now. Raises FetchError."""
        if self._http is None:
            self._http = _HttpForMsal(self._ca_bundle)
        self._http.last = None
        # MSAL would answer from here what it was told before: 5 s to an hour, by its own rules.
        self._http_cache.clear()
        try:
            result = self._ask()
            if "access_token" in result:
                return _usable(result)
        except Exception as error:  # noqa: BLE001  # MSAL documents none: httpx's, ValueError, ...
            raise self._failed({}, error) from None
        raise self._failed(result, None)

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
        self._http = self._app = None

    def _ask(self) -> Mapping[str, Any]:
        if isinstance(self._credential, str) or MANAGED not in self._credential:
            found = self._application().acquire_token_for_client([self._scope])
        else:
            resource = self._scope.removesuffix("/.default")
            found = self._platform(self._credential[MANAGED]).acquire_token_for_client(
                resource=resource
            )
        return dict(found)

    def _platform(self, identity: str) -> Any:
        """MSAL's client for the identity that Azure lends; a new one has no token in memory."""
        who = (
            msal.SystemAssignedManagedIdentity()
            if identity == SYSTEM
            else msal.UserAssignedManagedIdentity(client_id=identity)
        )
        return msal.ManagedIdentityClient(who, http_client=self._http, http_cache=self._http_cache)

    def _application(self) -> Any:
        """MSAL's client, with no token in memory; made on first use, for it asks Entra at once."""
        if self._app is None:
            self._app = msal.ConfidentialClientApplication(
                self._client_id,
                client_credential=self._credential,
                authority=self._authority,
                instance_discovery=False,
                http_client=self._http,
                http_cache=self._http_cache,
            )
        self._app.remove_tokens_for_client()
        return self._app

    def _failed(self, result: Mapping[str, Any], error: Exception | None) -> FetchError:
        """What went wrong, from MSAL's dict or from the last answer that Entra gave."""
        last = self._http.last if self._http else None
        if last is not None and last.status_code < 400:
            last = None  # Entra did not refuse: its 200 was unreadable, or MSAL stumbled before
        said = result or _json(last)
        name, number = said.get("error"), _first_number(said.get("error_codes"))
        name = name if isinstance(name, str) else None
        status = last.status_code if last is not None else None
        code = f"AADSTS{number}" if number else name or (status and f"HTTP{status}")
        detail = str(said.get("error_description") or (error if last is None else ""))
        refused = status is not None and 400 <= status < 500 and status != 429
        refused = refused and name not in _PASSING_ERRORS
        waits = REFUSED if refused else PASSING
        if last is not None and not refused:
            asked = retry_after(last.headers.get("retry-after"), last.headers.get("date"))
            waits = (max(asked, PASSING[0]),) * 2 if asked is not None else waits
        code = _printable(str(code or type(error).__name__))[:100]
        return FetchError(code, self._for_people(detail), waits)

    def _for_people(self, detail: str) -> str:
        """The first line, without what is secret, at most 300 characters."""
        parts = self._credential
        for secret in [parts] if isinstance(parts, str) else list(parts.values()):
            if isinstance(secret, str) and secret:
                detail = detail.replace(secret, "(secret)")
        return _printable((detail.splitlines() or [""])[0])[:300]


def _first_number(codes: object) -> int | None:
    """The first of Entra's error codes, where they have the form that is documented."""
    first = codes[0] if isinstance(codes, list) and codes else None
    return first if isinstance(first, int) else None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


class UnusableToken(ValueError):
    """Entra gave something that is no token, or none that could be used."""


def _usable(result: Mapping[str, Any]) -> tuple[str, timedelta]:
    """The token of a good answer, and how long it lives. Raises UnusableToken."""
    value, life = result["access_token"], result.get("expires_in")
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not value:
        raise UnusableToken("the access_token that Entra gave is no token")
    try:
        seconds = int(life or 0)
    except (TypeError, ValueError, OverflowError):
        seconds = 0
    if seconds <= 0:
        raise UnusableToken("the token that Entra gave has ended already, or never says when")
    return value, min(timedelta(seconds=min(seconds, 2**32)), LONGEST)


class _HttpForMsal:
    """What MSAL asks of an HTTP client, given by httpx; remembers the last answer.

    MSAL's own client is `requests`, where REQUESTS_CA_BUNDLE beats any `verify=` given to it.
    """

    def __init__(self, ca_bundle: str | None) -> None:
        self._trust = ssl.create_default_context(cafile=ca_bundle) if ca_bundle else True
        self._client = self._make_client()
        self.last: httpx.Response | None = None

    def get(self, url: str, params: Any = None, headers: Any = None, **_: Any) -> httpx.Response:
        if url.endswith(_DISCOVERY):
            return _discovered(url.removesuffix(_DISCOVERY))
        return self._ask("GET", url, params=params, headers=headers)

    def post(
        self, url: str, params: Any = None, data: Any = None, headers: Any = None, **_: Any
    ) -> httpx.Response:
        # MSAL gives an assertion as bytes, of which httpx would make the text "b'...'".
        form = {k: v.decode() if isinstance(v, bytes) else v for k, v in (data or {}).items()}
        form = {k: v for k, v in form.items() if v is not None}
        return self._ask("POST", url, params=params, data=form, headers=headers)

    def close(self) -> None:
        self._client.close()

    def _make_client(self) -> httpx.Client:
        return httpx.Client(verify=self._trust, timeout=HTTP_TIMEOUT)

    def _ask(self, method: str, url: str, **given: Any) -> httpx.Response:
        """In a thread of its own: httpx limits each read, and a server that drips has no end."""
        self.last = None
        client, end = self._client, time.monotonic() + IN_ALL
        answer: queue.SimpleQueue[httpx.Response | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put(_whole(client, end, method, url, given))
            except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
                answer.put(error)

        threading.Thread(target=ask, name="postroom-entra", daemon=True).start()
        try:
            said = answer.get(timeout=IN_ALL)
        except queue.Empty:
            self._client = self._make_client()  # what still drips keeps the old one
            raise httpx.ReadTimeout(f"no whole answer within {IN_ALL:g} seconds") from None
        if isinstance(said, Exception):
            raise said
        self.last = said
        return said


#: MSAL asks here first where tokens are given, but the address is documented, and what another
#: document says is no place to send a secret to.
#: https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow
_DISCOVERY = "/v2.0/.well-known/openid-configuration"


def _discovered(authority: str) -> httpx.Response:
    """The addresses of a tenant, as MSAL wants to hear them."""
    stem = f"{authority}/oauth2/v2.0"
    said = {"token_endpoint": f"{stem}/token", "authorization_endpoint": f"{stem}/authorize",
            "issuer": f"{authority}/v2.0"}  # fmt: skip
    return httpx.Response(200, json=said)


def _whole(
    client: httpx.Client, end: float, method: str, url: str, given: Mapping[str, Any]
) -> httpx.Response:
    """The answer with its body. Raises httpx.ReadError where that is huge or comes too late."""
    content = bytearray()
    with client.stream(method, url, **given) as response:
        for piece in response.iter_bytes():
            content += piece
            if len(content) > MOST or time.monotonic() > end:
                raise httpx.ReadError("the answer does not end")
    coded = {"content-encoding", "content-length", "transfer-encoding"}
    headers = [(k, v) for k, v in response.headers.multi_items() if k not in coded]
    return httpx.Response(
        response.status_code, headers=headers, content=bytes(content), request=response.request
    )


def _json(response: httpx.Response | None) -> Mapping[str, Any]:
    """The answer's JSON object, empty where it is something else."""
    try:
        said = response.json() if response is not None else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
