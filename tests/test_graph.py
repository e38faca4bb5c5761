"""The door to Graph, against a TLS server that misbehaves byte by byte, and the simulator."""

import asyncio
import contextlib
import json
import math
import random
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import jsonschema
import pytest
import trustme

from worker.graph import MARKER_PROPERTY, Graph, payload
from worker.model import (
    Absent,
    Accepted,
    Blocked,
    Forbidden,
    Found,
    NotSent,
    Rejected,
    Throttled,
    Trouble,
    Unknown,
)
from worker.simulator import Simulator

SCHEMA = json.loads((Path(__file__).parent / "schemas/sendMail.request.schema.json").read_text())
OK = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\nrequest-id: r-1\r\n\r\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A CA and the path of its certificate."""
    ca = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return ca, str(path)


class Server:
    """A TLS server whose answers are bytes or coroutines; it notes what arrived."""

    def __init__(self, authority, answer: Any = OK):
        ca, self.ca_bundle = authority
        self.answer = answer
        self.requests: list[Any] = []
        self.connections = 0
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert("localhost").configure_cert(self.context)
        self._tasks: set[Any] = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0, ssl=self.context)
        self.url = f"https://localhost:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        for _ in range(20):
            await asyncio.sleep(0)  # turns of the loop in which both ends see the other go

    async def _talk(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(
                    line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:-2]
                )
                body = await reader.readexactly(int(fields["content-length"]))
                self.requests.append((head.decode().split("\r\n")[0], fields, body))
                if callable(self.answer):
                    await self.answer(writer)
                else:
                    writer.write(self.answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            writer.transport.abort()


def graph_for(server, **changes):
    arguments = {"ca_bundle": server.ca_bundle, "request_timeout": timedelta(seconds=20), **changes}
    return Graph(server.url, **arguments)


@contextlib.asynccontextmanager
async def opened(graph):
    try:
        yield graph
    finally:
        await graph.close()


async def send(graph, mailbox="a@contoso.com", body=b"{}", left=60.0):
    return await graph.send(mailbox, body, "t0ken", deadline=time.monotonic() + left)


async def answered(authority, answer, **changes):
    """The outcome where the server answers so; there was exactly one request."""
    async with Server(authority, answer) as server, opened(graph_for(server, **changes)) as graph:
        outcome = await send(graph)
        assert len(server.requests) == 1
        return outcome


def http(status, body=b"", headers=""):
    lines = f"HTTP/1.1 {status} Word\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return lines.encode() + body


async def hang_up(writer):
    writer.transport.abort()


async def close(writer):
    writer.close()


async def hang(writer):
    await asyncio.sleep(3600)


def token_of(simulator):
    trust = ssl.create_default_context(cafile=simulator.ca_bundle)
    return httpx.post(
        f"{simulator.url}/{simulator.tenant_id}/oauth2/v2.0/token",
        data={
            "grant_type": "client_credentials",
            "client_id": simulator.client_id,
            "client_secret": simulator.client_secret,
            "scope": f"{simulator.url}/.default",
        },
        verify=trust,
    ).json()["access_token"]


def a_mail(message_id="m-1"):
    content = {"to": [{"address": "ann@example.org"}]}
    return payload(content, message_id=message_id, subject="Ä", html="<p>ö</p>", text=None)


def test_a_mail_goes_to_a_real_looking_graph(tmp_path):
    """Through TLS to the simulator, which checks the payload and keeps the marker."""
    with Simulator(tmp_path) as simulator:
        token = token_of(simulator)

        async def once():
            graph = Graph(
                simulator.url, ca_bundle=simulator.ca_bundle, request_timeout=timedelta(seconds=20)
            )
            async with opened(graph):
                return await graph.send(
                    "notices@contoso.com", a_mail(), token, deadline=time.monotonic() + 60
                )

        outcome = asyncio.run(once())
        assert isinstance(outcome, Accepted), outcome
        assert outcome.answer.request_id
        assert outcome.answer.duration > timedelta(0)
        [mail] = simulator.ledger()
        assert "m-1" in json.dumps(mail)


def test_the_request_is_what_graph_expects(authority):
    """Path, headers and body; a new client-request-id for each attempt."""

    async def twice():
        async with Server(authority) as server, opened(graph_for(server)) as graph:
            for _ in range(2):
                assert isinstance(await send(graph, "a+b/c?d@contoso.com", b"[1]"), Accepted)
            return server.requests, server.connections

    requests, connections = asyncio.run(twice())
    assert connections == 1, "the connection is kept"
    line, fields, body = requests[0]
    method, path, version = line.split()
    assert (method, version, body) == ("POST", "HTTP/1.1", b"[1]")
    assert path.count("/") == 4, "a slash in a mailbox does not make a path"
    assert "?" not in path
    assert unquote(path) == "/v1.0/users/a+b/c?d@contoso.com/sendMail"
    assert fields["authorization"] == "bearer t0ken"
    assert fields["content-type"] == "application/json"
    assert fields["accept-encoding"] == "identity"
    assert fields["content-length"] == "3"
    assert "transfer-encoding" not in fields
    assert fields["client-request-id"] != requests[1][1]["client-request-id"]


@pytest.mark.parametrize("answer", [hang_up, close, b"\x00garbage\r\n\r\n", b"HTTP/1.1 2", b"\r\n"])
def test_a_lost_answer_is_doubt_and_the_request_is_not_repeated(authority, answer):
    """The mail may have gone out: no library below us may send it again or call it unsent."""

    async def bytes_and_close(writer):
        writer.write(answer)
        writer.close()

    broken = answer if callable(answer) else bytes_and_close
    outcome = asyncio.run(answered(authority, broken))
    assert isinstance(outcome, Unknown), outcome
    assert outcome.answer.status is None
    assert outcome.answer.code


STATUS_LINE = b"HTTP/1.1 202 Accepted\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        STATUS_LINE,
        b"HTTP/1.1 202\r\n",
        STATUS_LINE + b"reques",
        STATUS_LINE + b"\x00garbage\r\n\r\n",
        STATUS_LINE + b"Content-Length: many\r\n\r\n",
        STATUS_LINE + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        STATUS_LINE + b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n",
        STATUS_LINE + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnot!",
        STATUS_LINE + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
        STATUS_LINE + b"".join(b"X%d: y\r\n" % n for n in range(5000)) + b"\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + STATUS_LINE,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + STATUS_LINE,
    ],
)
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_202_is_sent_whatever_follows_it(authority, answer, end):
    """Its status line has come whole; that the rest is cut, broken or huge takes nothing away."""

    async def broken(writer):
        writer.write(answer)
        await writer.drain()
        writer.close() if end == "close" else writer.transport.abort()

    outcome = asyncio.run(answered(authority, broken))
    assert isinstance(outcome, Accepted), outcome
    assert outcome.answer.status == 202


def test_a_202_whose_head_never_ends_is_sent_when_time_is_up(authority):
    """The request timeout ends the waiting; what had come by then is evidence."""

    async def dribble(writer):
        writer.write(STATUS_LINE + b"X: ")
        await hang(writer)

    outcome = asyncio.run(answered(authority, dribble, request_timeout=timedelta(seconds=0.5)))
    assert isinstance(outcome, Accepted), outcome


@pytest.mark.parametrize(
    "answer",
    [
        STATUS_LINE[:-1],
        b"HTTP/1.1 20",
        b"HTTP/1.1 2020 Accepted\r\n",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 400 Bad Request\r\nX: ",
        b"HTTP/1.1 429 Too Many Requests\r\n",
        b"HTTP/1.1 415 Word\r\nTransfer-Encoding: chunked\r\n\r\nno chunk at all\r\n",
        b"HTTP/1.1 503 Busy\r\nX: 202 Accepted\r\n",
        b"HTTP/1.1 100 Continue\r\nX: y\r\n" + STATUS_LINE,
        b"x" + STATUS_LINE,
        b"\r\n\r\nGET / 202\r\n" + STATUS_LINE,
    ],
)
def test_a_head_that_breaks_off_proves_nothing_else(authority, answer):
    """Half a status line is none, and a refusal may be cut short of the code that tells it."""

    async def broken(writer):
        writer.write(answer)
        writer.close()

    outcome = asyncio.run(answered(authority, broken))
    assert isinstance(outcome, Unknown), outcome
    assert outcome.answer.status is None


def test_the_head_of_one_answer_says_nothing_about_the_next_request(authority):
    """On a kept connection the 202 before it is forgotten when a request goes out."""

    async def good_then_cut():
        async with Server(authority) as server, opened(graph_for(server)) as graph:
            assert isinstance(await send(graph), Accepted)
            server.answer = close
            return await send(graph), server.connections

    outcome, connections = asyncio.run(good_then_cut())
    assert isinstance(outcome, Unknown), outcome
    assert connections == 1


def test_a_kept_connection_that_dies_under_a_request_is_doubt_too(authority):
    """aiohttp repeats idempotent requests on a stale connection; ours must not be among them."""

    async def first_then_none():
        async with Server(authority) as server, opened(graph_for(server)) as graph:
            assert isinstance(await send(graph), Accepted)
            server.answer = close
            outcome = await send(graph)
            return outcome, len(server.requests), server.connections

    outcome, requests, connections = asyncio.run(first_then_none())
    assert isinstance(outcome, Unknown), outcome
    assert (requests, connections) == (2, 1)


def test_an_answer_that_nobody_asked_for_is_not_the_next_ones(authority):
    """A second 202 comes on a connection that lies idle: the next request is not taken for sent."""

    async def one_too_many():
        late = asyncio.Event()

        async def twice(writer):
            writer.write(OK)
            await writer.drain()
            await late.wait()
            writer.write(OK)

        async with Server(authority, twice) as server, opened(graph_for(server)) as graph:
            assert isinstance(await send(graph), Accepted)
            [[(protocol, _)]] = graph._wire._session.connector._conns.values()
            late.set()
            while not protocol._buffer:
                await asyncio.sleep(0.01)  # its bytes are on the way
            server.answer = http(429)
            return await send(graph), len(server.requests)

    outcome, requests = asyncio.run(asyncio.wait_for(one_too_many(), 20))
    assert isinstance(outcome, Throttled), outcome
    assert requests == 2


def test_an_answer_that_never_comes_is_doubt_after_the_request_timeout(authority):
    """One limit for all of it."""
    outcome = asyncio.run(answered(authority, hang, request_timeout=timedelta(seconds=0.5)))
    assert isinstance(outcome, Unknown), outcome
    assert outcome.answer.code == "TimeoutError"
    assert timedelta(seconds=0.5) <= outcome.answer.duration < timedelta(seconds=10)


@pytest.mark.parametrize(
    ("answer", "expected", "code"),
    [
        (OK.replace(b"Length: 0", b"Length: 99"), Accepted, None),
        (http(202, b"{}", "Retry-After: 10\r\n"), Accepted, None),
        (http(503, b"<html>"), Unknown, None),
        (http(200, b"<html>Sign in, please"), Unknown, None),
        (http(204), Unknown, None),
        (http(401, b"\x1f\x8b no gzip", "Content-Encoding: gzip\r\n"), Blocked, None),
        (http(429, b"", "Retry-After: nonsense\r\nRetry-After: 7\r\n"), Throttled, None),
        (http(504, b"", "Retry-After: -1\r\n"), Unknown, None),
        (http(400, b"[" * 60_000), Rejected, None),
        (http(400, b"x" * 900_000), Rejected, None),
        (http(400, b'{"error": {"code": 7, "innerError": []}}'), Rejected, None),
        (http(400, b'{"error": "no"}'), Rejected, None),
        (http(400, b'\xff{"error"'), Rejected, None),
        (http(403, b'{"error": {"code": "ErrorAccessDenied"}}'), Blocked, "ErrorAccessDenied"),
        (http(302, b"", "Location: https://localhost:1/\r\n"), Rejected, None),
        (http(429, b"", "retry-after: 2.128\r\n"), Throttled, None),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, Accepted, None),
    ],
)
def test_the_status_decides_whatever_the_body_is(authority, answer, expected, code):
    """A body that is broken, huge, nested or missing takes nothing away from the status."""
    outcome = asyncio.run(answered(authority, answer))
    assert type(outcome) is expected, outcome
    assert outcome.answer.code == code


def test_a_body_that_never_ends_does_not_take_the_status_away(authority, monkeypatch):
    """The mailbox's slot is not held for the sake of an error text."""
    monkeypatch.setattr("worker.graph.wire.BODY_TIMEOUT", 0.2)

    async def head_only(writer):
        writer.write(http(400, b"x" * 10)[:-5])
        await hang(writer)

    assert isinstance(asyncio.run(answered(authority, head_only)), Rejected)


def test_the_answer_keeps_what_people_need_and_no_address(authority):
    """Inner code if known, request id from the body where no header has it, no mail address."""
    error = {
        "code": "OuterWord",
        "message": "Mailbox ann@contoso.com\r\n is gone. " + "x" * 500,
        "innererror": {"code": "ErrorInvalidUser", "request-id": "from-body", "innerError": 3},
    }
    outcome = asyncio.run(answered(authority, http(404, json.dumps({"error": error}).encode())))
    answer = outcome.answer
    assert (answer.status, answer.code, answer.request_id) == (404, "ErrorInvalidUser", "from-body")
    assert answer.detail.startswith("Mailbox (address) is gone.")
    assert len(answer.detail) == 300


def test_what_an_answer_says_is_one_line_without_addresses_and_tokens(authority):
    """Codes and ids go into the log as they are: nobody else's lines, addresses or secrets may."""
    hostile = "ann@example.org\nERROR: forged"
    token = "eyJ0eXAi.eyJhdWQi.c2ln"
    error = {
        "code": hostile,
        "message": f"Bearer 0paque/t= or {token} is t0ken",
        "innerError": {"request-id": hostile},
    }
    outcome = asyncio.run(answered(authority, http(400, json.dumps({"error": error}).encode())))
    answer = outcome.answer
    assert answer.code == answer.request_id == "(address) ERROR: forged"
    assert answer.detail == "Bearer (token) or (token) is t0ken"


def test_retry_after_is_held_against_the_answers_own_date(authority):
    """Our clock may be wrong by hours."""
    headers = (
        "Date: Wed, 21 Oct 2026 07:28:00 GMT\r\nRetry-After: Wed, 21 Oct 2026 07:28:30 GMT\r\n"
    )
    outcome = asyncio.run(answered(authority, http(429, b"", headers)))
    assert outcome.answer.retry_after == timedelta(seconds=31), "dates leave out up to a second"


def test_a_retry_after_without_a_date_beside_it_is_held_against_our_clock(authority):
    """A proxy may leave the Date out; to come back at once would be worse than a wrong clock."""
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    outcome = asyncio.run(answered(authority, http(429, b"", f"Retry-After: {soon}\r\n")))
    assert timedelta(seconds=50) < outcome.answer.retry_after <= timedelta(seconds=62)


def test_without_a_connection_nothing_was_sent(authority, tmp_path):
    """Refused, unknown host, wrong certificate, a handshake that hangs: all surely not sent."""
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    with socket.create_server(("127.0.0.1", 0)) as deaf, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening
        addresses = [
            f"https://localhost:{closed.getsockname()[1]}",
            "https://nowhere.invalid",
            f"https://localhost:{deaf.getsockname()[1]}",
        ]

        async def all_of_them():
            async with Server(authority) as server:
                graphs = [
                    Graph(a, ca_bundle=server.ca_bundle, request_timeout=timedelta(seconds=2))
                    for a in addresses
                ]
                graphs.append(graph_for(server, ca_bundle=str(other)))
                outcomes = []
                for graph in graphs:
                    async with opened(graph):
                        outcomes.append(await send(graph))
                return outcomes, server.requests

        outcomes, requests = asyncio.run(all_of_them())
    assert [type(o) for o in outcomes] == [NotSent] * 4, outcomes
    assert not requests
    assert outcomes[2].answer.code == "TimeoutError"
    assert outcomes[3].answer.code == "ClientConnectorCertificateError"


def test_a_request_whose_lease_is_nearly_over_does_not_leave(authority):
    """The guard is the last line before the bytes, on new and kept connections."""

    async def late():
        async with Server(authority) as server, opened(graph_for(server)) as graph:
            outcomes = [await send(graph, left=0), await send(graph), await send(graph, left=-1)]
            return outcomes, len(server.requests), server.connections

    outcomes, requests, connections = asyncio.run(late())
    assert [type(o) for o in outcomes] == [NotSent, Accepted, NotSent], outcomes
    assert outcomes[0].answer.code == outcomes[2].answer.code == "LeaseNearlyOver"
    assert requests == 1
    assert connections >= 2, "it had connected before it refused"


def test_the_guard_looks_after_a_slow_connection(authority):
    """A deadline that passes while the handshake hangs stops the request."""

    async def slow():
        async with Server(authority) as server:
            port = int(server.url.rpartition(":")[2])
            done = asyncio.Event()

            async def delayed(reader, writer):
                await asyncio.sleep(0.5)
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer))
                done.set()

            proxy = await asyncio.start_server(delayed, "127.0.0.1", 0)
            url = f"https://localhost:{proxy.sockets[0].getsockname()[1]}"
            slow_graph = Graph(
                url, ca_bundle=server.ca_bundle, request_timeout=timedelta(seconds=20)
            )
            async with proxy, opened(slow_graph):
                outcome = await send(slow_graph, left=0.3)
                await asyncio.wait_for(done.wait(), 20)
                return outcome, len(server.requests)

    outcome, requests = asyncio.run(slow())
    assert isinstance(outcome, NotSent), outcome
    assert (outcome.answer.code, requests) == ("LeaseNearlyOver", 0)


async def pipe(reader, writer):
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


def test_a_cancelled_send_is_cancelled(authority):
    """A lane that stops is told so, not given an outcome."""

    async def cancelled():
        async with Server(authority, hang) as server, opened(graph_for(server)) as graph:
            task = asyncio.create_task(send(graph))
            while not server.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(asyncio.wait_for(cancelled(), 20))


def test_the_ca_bundle_that_was_set_wins_over_the_environment(authority, tmp_path, monkeypatch):
    """REQUESTS_CA_BUNDLE and SSL_CERT_FILE of another application do not matter."""
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(other))
    assert isinstance(asyncio.run(answered(authority, OK)), Accepted)


def test_the_proxy_of_the_environment_is_used_unless_the_host_is_excepted(authority, monkeypatch):
    """A dead proxy shows that it was asked; NO_PROXY shows that it can be left out."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")

        async def both():
            async with Server(authority) as server:
                async with opened(graph_for(server)) as graph:
                    through = await send(graph)
                monkeypatch.setenv("no_proxy", "localhost")
                async with opened(graph_for(server)) as graph:
                    return through, await send(graph)

        through, around = asyncio.run(both())
    assert isinstance(through, NotSent), through
    assert isinstance(around, Accepted), around


def test_no_bytes_that_a_server_may_answer_raise(authority):
    """200 answers of noise, cut and bent from good ones: outcomes all of them."""
    dice = random.Random(7)
    good = [
        OK.replace(b"ed", b"\xff"),
        OK,
        http(400, b'{"error": {"code": "x"}}'),
        http(503, b"", "Retry-After: \xff\r\n"),
    ]

    def bent():
        answer = bytearray(dice.choice(good))
        for _ in range(dice.randint(0, 4)):
            answer[dice.randrange(len(answer))] = dice.randrange(256)
        return bytes(answer[: dice.randint(0, len(answer))])

    async def all_of_them():
        async with Server(authority) as server, opened(graph_for(server)) as graph:
            for _ in range(200):
                answer = bent()

                async def talk(writer, answer=answer):
                    writer.write(answer)
                    writer.close()

                server.answer = talk
                outcome = await send(graph)
                assert isinstance(outcome, Accepted | Unknown | Rejected | Throttled | Blocked), (
                    answer,
                    outcome,
                )
            assert len(server.requests) == 200, "none was repeated, none was called unsent"

    asyncio.run(all_of_them())


# ---- looks ---------------------------------------------------------------------------------------


def test_a_look_finds_what_the_mailbox_holds(tmp_path):
    """The message itself and no other, in Drafts too; nothing in another mailbox; 403 and 404."""
    with Simulator(tmp_path, drafts_seconds=3600, mailboxes="a@contoso.com,b@contoso.com") as sim:
        token = token_of(sim)

        async def looks():
            graph = Graph(sim.url, ca_bundle=sim.ca_bundle, request_timeout=timedelta(seconds=20))
            async with opened(graph):
                await graph.send("a@contoso.com", a_mail("m-1"), token, deadline=math.inf)
                seen = [
                    await graph.look(*where, token)
                    for where in [
                        ("a@contoso.com", "m-1"),
                        ("a@contoso.com", "m-2"),
                        ("b@contoso.com", "m-1"),
                        ("gone@contoso.com", "m-1"),
                    ]
                ]
                sim.settings(mail_read=False)
                return [
                    *seen,
                    await graph.look("a@contoso.com", "m-1", token),
                    await graph.look("a@contoso.com", "m-1", "no token"),
                ]

        found, *rest = asyncio.run(looks())
        [mail] = sim.ledger()
    assert isinstance(found, Found), found
    assert (found.graph_id, found.answer.status) == (mail["id"], 200)
    assert found.sent_at is not None
    assert [type(one) for one in rest] == [Absent, Absent, Forbidden, Forbidden, Trouble]
    assert (rest[3].answer.status, rest[3].answer.code) == (403, "ErrorAccessDenied")
    assert rest[4].answer.status == 401


def page(mails, following=None, **more):
    link = {} if following is None else {"@odata.nextLink": following}
    return http(200, json.dumps({"value": mails, **link, **more}).encode())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (page([]), Absent),
        (page([{"id": "x"}]), Found),
        (page([{}]), Found),
        (page([{"id": 7, "sentDateTime": []}]), Found),
        (page([], 7), Absent),
        (page([], "https://elsewhere.example/v1.0/users/a/messages"), Trouble),
        (page([], "http://[broken"), Trouble),
        (page([])[:-1], Trouble),
        (page({}), Trouble),
        (page(["x"]), Trouble),
        (http(200, b'{"value": null}'), Trouble),
        (http(200, b"[]"), Trouble),
        (http(200, b"<html>Sign in"), Trouble),
        (http(200, b"[" * 60_000), Trouble),
        (http(200, b'{"value": [], "x": "' + b"y" * 900_000 + b'"}'), Trouble),
        (http(202), Trouble),
        (http(204), Trouble),
        (http(302, b"", "Location: https://localhost:1/\r\n"), Trouble),
        (http(400, b'{"error": {"code": "BadRequest"}}'), Trouble),
        (http(429, b"", "Retry-After: 3\r\n"), Trouble),
        (http(503), Trouble),
        (b"HTTP/1.1 200 OK\r\nX: ", Trouble),
        (STATUS_LINE, Trouble),
        (b"", Trouble),
    ],
)
def test_only_a_whole_good_answer_says_that_a_message_is_absent(authority, answer, expected):
    """What is cut, odd, or somebody else's page proves nothing."""

    async def look():
        async def broken(writer):
            writer.write(answer)
            writer.close()

        async with Server(authority, broken) as server, opened(graph_for(server)) as graph:
            return await graph.look("a@contoso.com", "m-1", "t0ken")

    assert type(asyncio.run(look())) is expected


@pytest.mark.parametrize(
    ("mails", "graph_id", "draft"),
    [
        ([{"id": "a", "isDraft": True}], "a", True),
        ([{"id": "a", "isDraft": True}, {"id": "b", "isDraft": False}], "b", False),
        ([{"id": "a"}], "a", False),
    ],
)
def test_a_look_tells_a_draft_from_a_mail(authority, mails, graph_id, draft):
    """What was sent wins over what lies in Drafts beside it."""

    async def look():
        async with Server(authority, page(mails)) as server, opened(graph_for(server)) as graph:
            return await graph.look("a@contoso.com", "m-1", "t0ken")

    found = asyncio.run(look())
    assert (found.graph_id, found.draft) == (graph_id, draft)


@pytest.mark.parametrize(
    ("empty", "last", "expected"),
    [(1, [], Absent), (3, [{"id": "x"}], Found), (4, [], Absent), (9, [{"id": "x"}], Trouble)],
)
def test_a_search_is_read_to_its_last_page(authority, empty, last, expected):
    """Graph may give empty pages with more to come; there is an end to that as well."""

    async def look():
        async with Server(authority) as server, opened(graph_for(server)) as graph:
            following = f"{server.url}/v1.0/Users('a')/messages?$skiptoken=x%27y"

            async def next_page(writer):
                more = len(server.requests) <= empty
                writer.write(page([] if more else last, following if more else None))

            server.answer = next_page
            seen = await graph.look("a@contoso.com", "m-1", "t0ken")
            return seen, server.requests

    seen, requests = asyncio.run(look())
    assert type(seen) is expected
    line, fields, _ = requests[0]
    assert unquote(line).startswith("GET /v1.0/users/a@contoso.com/messages?$filter=")
    assert "m-1" in unquote(line)
    assert MARKER_PROPERTY in unquote(line)
    assert fields["prefer"] == 'idtype="immutableid"'
    assert "content-type" not in fields, "there is no content"
    assert all("skiptoken=x'y" in unquote(other) for other, _, _ in requests[1:])


# ---- payload ------------------------------------------------------------------------------------


def test_a_full_payload_is_what_microsofts_schema_allows():
    """All that a message can say, in Graph's words."""
    content = {
        "to": [{"address": "a@x.org", "name": "Ann"}, {"address": "b@x.org"}],
        "cc": [{"address": "c@x.org"}],
        "bcc": [{"address": "d@x.org", "name": ""}],
        "reply_to": [{"address": "e@x.org"}],
        "from": {"address": "f@x.org"},
        "importance": "high",
        "headers": {"x-job": "7"},
        "list_unsubscribe": "<mailto:u@x.org>",
        "save_to_sent_items": False,
    }
    raw = payload(content, message_id="m-1", subject="Ünï", html="<p>☃</p>", text="left out")
    assert "☃".encode() in raw, "text is sent as it is, not escaped"
    document = json.loads(raw)
    jsonschema.validate(document, SCHEMA)
    message = document["message"]
    assert document["saveToSentItems"] is False
    assert message["body"] == {"contentType": "html", "content": "<p>☃</p>"}
    assert message["toRecipients"][0] == {"emailAddress": {"address": "a@x.org", "name": "Ann"}}
    assert message["bccRecipients"] == [{"emailAddress": {"address": "d@x.org"}}]
    assert message["from"] == {"emailAddress": {"address": "f@x.org"}}
    assert {"id": MARKER_PROPERTY, "value": "m-1"} in message["singleValueExtendedProperties"]
    unsubscribe = {"id": "String 0x1045", "value": "<mailto:u@x.org>"}
    assert unsubscribe in message["singleValueExtendedProperties"]
    assert {"name": "x-postroom-id", "value": "m-1"} in message["internetMessageHeaders"]


def test_a_small_payload_has_no_empty_arrays_and_nothing_null():
    """Graph refuses an empty internetMessageHeaders, and a null is only noise."""
    document = json.loads(
        payload({"to": [{"address": "a@x.org"}]}, message_id="m", subject="", html=None, text="hi")
    )
    jsonschema.validate(document, SCHEMA)
    assert document["saveToSentItems"] is True
    assert document["message"]["body"] == {"contentType": "text", "content": "hi"}
    assert all(value not in ([], None) for value in document["message"].values())


def test_a_lone_surrogate_does_not_stop_a_lane():
    """Half a character has no UTF-8; the rest of the mail goes."""
    raw = payload({"to": [{"address": "a@x.org"}]}, message_id="m", subject="a\ud800b",
                  html=None, text="")  # fmt: skip
    assert json.loads(raw)["message"]["subject"] == "a?b"
