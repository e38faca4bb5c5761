"""An Entra that answers by no book: every answer becomes a token or a wait, and none costs long."""

from __future__ import annotations

import itertools
import json
import logging
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.tokens import TokenRefused, Tokens, entra
from worker.tokens.entra import LONGEST, PASSING

SECRET = "s3cret-value"
SERIALS = itertools.count()


class Entra(socketserver.ThreadingTCPServer):
    """Discovery as it should be; the answer to a token request is as a test wants it."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        ca = trustme.CA()
        self.ca_bundle = str(directory / "ca.pem")
        ca.cert_pem.write_to_path(self.ca_bundle)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert("localhost").configure_cert(context)
        self.answer: Callable[[Any], None] = lambda _: None
        self.asked = 0
        super().__init__(("127.0.0.1", 0), Talk)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"https://localhost:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is the point of some tests."""


class Talk(socketserver.StreamRequestHandler):
    """One request, one answer."""

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, Entra)
        line, length = self.rfile.readline(), 0
        while (field := self.rfile.readline().lower()) not in {b"\r\n", b""}:
            if field.startswith(b"content-length:"):
                length = int(field.partition(b":")[2])
        self.rfile.read(length)
        if not line.startswith(b"POST /t/oauth2/v2.0/token "):
            self.wfile.write(http(404, b"<html>Nothing else is documented."))
            return
        server.asked += 1
        server.answer(self.wfile)


def http(status: int, body: Any, headers: str = "") -> bytes:
    """An answer, with JSON or with bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Word\r\nContent-Length: {len(content)}\r\nConnection: close\r\n"
    return (head + headers + "\r\n").encode() + content


def token(**changes: Any) -> dict[str, Any]:
    """What Entra gives; a field that is changed to `...` is left out."""
    good = {"token_type": "Bearer", "expires_in": 3599, "access_token": "abc"} | changes
    return {k: v for k, v in good.items() if v is not ...}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entra]:
    """One for all; each test says how it answers."""
    with Entra(tmp_path_factory.mktemp("entra")) as running:
        yield running
        running.shutdown()


@pytest.fixture
def tokens(server: Entra, redis_url: str) -> Iterator[Tokens]:
    """A process's tokens, of an application that nobody else has."""
    client = redis.Redis.from_url(redis_url, retry=Retry(NoBackoff(), 0))
    made = Tokens(
        client, authority=server.url, tenant_id="t", client_id=f"app-{next(SERIALS)}",
        credential=SECRET, scope=f"{server.url}/.default", ca_bundle=server.ca_bundle,
        margin=entra.REFUSED[0] * 10,
    )  # fmt: skip
    server.asked = 0
    yield made
    made.close()
    client.close()


def refusal(tokens: Tokens) -> TokenRefused:
    with pytest.raises(TokenRefused) as caught:
        tokens.get()
    return caught.value


@pytest.mark.parametrize("life", [3599, "3599", 1], ids=repr)
def test_a_lifetime_may_be_a_number_or_its_text(server: Entra, tokens: Tokens, life: Any) -> None:
    """Entra's older endpoint gives it as text."""
    server.answer = lambda out: out.write(http(200, token(expires_in=life)))
    found = tokens.get()
    assert found.value == "abc"
    assert int(life) - 1 < found.left.total_seconds() <= int(life)


def test_a_lifetime_beyond_all_measure_is_cut(server: Entra, tokens: Tokens) -> None:
    """Databases and Python know no year 300000; a claim with such an end would break a lane."""
    server.answer = lambda out: out.write(http(200, token(expires_in=10**13)))
    assert tokens.get().left <= LONGEST


@pytest.mark.parametrize(
    "answer",
    [
        token(expires_in=0), token(expires_in=-5), token(expires_in="0"), token(expires_in="soon"),
        token(expires_in=None), token(expires_in=...), token(expires_in=[]),
        token(access_token=None), token(access_token=""), token(access_token=7),
        token(access_token="a\r\nX: y"), token(access_token=...), [], "abc", None, b"", b"<html>",
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_token_is_waited_out(server: Entra, tokens: Tokens, answer: Any) -> None:
    """It is asked for once and not with every message, and no lane works with it."""
    server.answer = lambda out: out.write(http(200, answer))
    refused = refusal(tokens)
    assert PASSING[0] / 2 < refused.wait <= PASSING[1]
    refusal(tokens)
    assert server.asked == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"error": "invalid_client", "error_codes": 7000215}, "invalid_client"),
        ({"error": "invalid_client", "error_codes": "7000215"}, "invalid_client"),
        ({"error_codes": {"first": 7000215}}, "HTTP400"),
        ({"error_codes": []}, "HTTP400"),
        ({"error_codes": [None]}, "HTTP400"),
        ({"error": {"code": "invalid_client"}}, "HTTP400"),
        ({"error": ["invalid_client"]}, "HTTP400"),
        ({"error": "a\ud800\u0000b", "error_description": "\udfff"}, "a  b"),
        ({"error": "x" * 5000, "error_description": "y" * 5000}, "x" * 100),
        ([], "HTTP400"), (b"", "HTTP400"), (b"<html>", "HTTP400"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_refusal_of_any_shape_is_a_refusal(
    server: Entra, tokens: Tokens, body: Any, code: str
) -> None:
    """One request, one line for people; and what Redis could not keep is left out."""
    server.answer = lambda out: out.write(http(400, body))
    refused = refusal(tokens)
    assert refused.code == code
    assert len(refused.detail) <= 300
    assert (refused.detail + refused.code).isprintable()
    assert refusal(tokens).code == code
    assert server.asked == 1


def test_an_answer_that_cannot_be_read_is_not_logged(
    server: Entra, tokens: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    """MSAL would log all of it: a token may lie in what was cut."""
    server.answer = lambda out: out.write(http(200, b'{"access_token": "canary", "expi'))
    with caplog.at_level(logging.DEBUG):
        refusal(tokens)
    assert "canary" not in caplog.text


def drip(out: Any) -> None:
    """A byte now and then: each read ends in time, and all of them never do."""
    for byte in http(200, token() | {"more": "x" * 10_000}):
        out.write(bytes([byte]))
        time.sleep(0.02)


def pour(out: Any) -> None:
    """A body without end."""
    out.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        out.write(b" " * 65_536)


def silence(_: Any) -> None:
    """No answer."""
    time.sleep(2)


@pytest.mark.parametrize("answer", [drip, pour, silence])
def test_an_answer_without_end_is_given_up(
    server: Entra, tokens: Tokens, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever, nothing fills the memory, and the next answer counts."""
    monkeypatch.setattr(entra, "IN_ALL", 0.5)
    server.answer = answer
    began = time.monotonic()
    refused = refusal(tokens)
    assert time.monotonic() - began < 5
    assert refused.wait <= PASSING[1]
    server.answer = lambda out: out.write(http(200, token()))
    assert tokens.fresh().value == "abc"


@pytest.mark.parametrize(
    ("status", "headers", "least", "most"),
    [
        (429, "Retry-After: 60\r\n", 59, 60),
        (429, "Retry-After: 0\r\n", 0.5, 1),
        (429, "", 0.5, 1),
        (503, "Retry-After: 2.5\r\n", 2, 3),
        (503, "Retry-After: 999999\r\n", 3590, 3600),
        (500, "Retry-After: soon\r\n", 0.5, 1),
        (302, "Location: https://localhost:1/\r\n", 0.5, 1),
        (400, "", 29, 30),
        (401, "Retry-After: 1\r\n", 29, 30),
        (407, "", 29, 30),
    ],
)
def test_a_refusal_is_waited_out(
    server: Entra, tokens: Tokens, status: int, headers: str, least: float, most: float
) -> None:
    """As long as Entra says where it is busy; longer where the credential is at fault."""
    server.answer = lambda out: out.write(http(status, b"<html>", headers))
    assert least <= refusal(tokens).wait.total_seconds() <= most


def test_a_secret_that_comes_back_is_not_told(server: Entra, tokens: Tokens) -> None:
    """An error text that holds what was sent does not bring it into logs and Redis."""
    said = {"error": "invalid_client", "error_description": f"no {SECRET}!\nTrace: x"}
    server.answer = lambda out: out.write(http(401, said))
    assert str(refusal(tokens)) == "no token: invalid_client: no (secret)!"
