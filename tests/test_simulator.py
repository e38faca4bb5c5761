"""The simulated Graph and Entra, seen through plain httpx over TLS."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
import pytest
import trustme

from worker.simulator import Simulator
from worker.simulator.hostile import MIX
from worker.simulator.settings import SettingError

PROPERTY = "String {5f1d9c0e-54a7-4d8e-9d0c-2b6a1f0c7e11} Name PostroomId"
MAILBOX = "notices@contoso.com"
Start = Callable[..., "Caller"]


class Caller:
    """A simulator and a client that trusts it."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.trust = ssl.create_default_context(cafile=simulator.ca_bundle)
        self.http = httpx.Client(
            verify=self.trust, base_url=simulator.url, timeout=20, trust_env=False
        )
        self.headers: dict[str, str] = {}

    def ask_token(self, tenant: str | None = None, **changes: str) -> httpx.Response:
        """A client credentials request; a change to "" leaves the field out."""
        form = {
            "grant_type": "client_credentials",
            "client_id": self.simulator.client_id,
            "client_secret": self.simulator.client_secret,
            "scope": "https://graph.microsoft.com/.default",
        } | changes
        path = f"/{tenant or self.simulator.tenant_id}/oauth2/v2.0/token"
        return self.http.post(path, data={name: text for name, text in form.items() if text})

    def sign_in(self) -> None:
        """Carry a good token from now on."""
        token = self.ask_token().json()["access_token"]
        self.headers["Authorization"] = f"Bearer {token}"

    def send(self, mailbox: str = MAILBOX, *, save: bool = True, **changes: Any) -> httpx.Response:
        """sendMail of a small mail with these changes to its message."""
        body = {"message": mail(**changes), "saveToSentItems": save}
        return self.http.post(f"/v1.0/users/{mailbox}/sendMail", json=body, headers=self.headers)

    def look(self, marker: str, folder: str = "", mailbox: str = MAILBOX) -> list[dict[str, Any]]:
        """Mails of a mailbox with this marker."""
        place = f"mailFolders/{folder}/messages" if folder else "messages"
        query = (
            f"singleValueExtendedProperties/any(ep: ep/id eq '{PROPERTY}' "
            f"and ep/value eq '{marker}')"
        )
        answer = self.http.get(
            f"/v1.0/users/{mailbox}/{place}", params={"$filter": query}, headers=self.headers
        )
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["value"]
        return found


def mail(marker: str = "m-1", **changes: Any) -> dict[str, Any]:
    """A message in Graph's shape; a change to None leaves the field out."""
    message = {
        "subject": "Invoice",
        "body": {"contentType": "html", "content": "<p>Hello</p>"},
        "toRecipients": [{"emailAddress": {"address": "ann@example.org"}}],
        "internetMessageHeaders": [{"name": "x-postroom-id", "value": marker}],
        "singleValueExtendedProperties": [{"id": PROPERTY, "value": marker}],
    } | changes
    return {name: value for name, value in message.items() if value is not None}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts simulators with options; each is stopped at the end."""
    with ExitStack() as stack:

        def begin(directory: str = "simulator", **options: Any) -> Caller:
            simulator = stack.enter_context(Simulator(tmp_path / directory, **options))
            caller = Caller(simulator)
            stack.callback(caller.http.close)
            caller.sign_in()
            return caller

        yield begin


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """One simulator for the tests that leave nothing behind but in a mailbox of their own."""
    with Simulator(tmp_path_factory.mktemp("shared")) as simulator:
        caller = Caller(simulator)
        caller.sign_in()
        yield caller
        caller.http.close()


def until(holds: Callable[[], bool], seconds: float = 15.0) -> None:
    """Wait for a predicate, with a deadline."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def code(answer: httpx.Response) -> tuple[int, str]:
    """Status and error code."""
    return answer.status_code, answer.json()["error"]["code"]


def accepted_by(graph: Caller, mailbox: str) -> int:
    """How many mails of this mailbox the ledger holds."""
    return sum(row["mailbox"] == mailbox for row in graph.simulator.ledger())


def test_an_accepted_mail_stands_in_the_ledger_with_what_identifies_it(start: Start) -> None:
    """The ledger is what every promise of the worker is checked against."""
    graph = start()
    graph.headers["client-request-id"] = "ours-1"

    answer = graph.send(ccRecipients=[{"emailAddress": {"address": "bob@example.org"}}])

    (row,) = graph.simulator.ledger()
    assert (answer.status_code, answer.content) == (202, b"")
    assert answer.headers["client-request-id"] == "ours-1"
    assert "DataCenter" in answer.headers["x-ms-ags-diagnostic"]
    assert row["request_id"] == answer.headers["request-id"]
    assert row["client_request_id"] == "ours-1"
    assert (row["marker"], row["mailbox"], row["subject"]) == ("m-1", MAILBOX, "Invoice")
    assert row["recipients"] == ["ann@example.org", "bob@example.org"]
    assert row["headers"] == {"x-postroom-id": "m-1"}


def test_the_sdk_spelling_of_the_parameters_is_accepted(start: Start) -> None:
    """Microsoft's SDKs write the metadata's capital letters, its documents camel case."""
    graph = start()
    body = {"Message": mail(), "SaveToSentItems": False}

    answer = graph.http.post(f"/beta/users/{MAILBOX}/sendMail", json=body, headers=graph.headers)

    assert answer.status_code == 202
    assert graph.simulator.ledger()[0]["save_to_sent_items"] is False


@pytest.mark.parametrize(
    ("changes", "status", "error", "number"),
    [
        ({"client_secret": "wrong"}, 401, "invalid_client", 7000215),
        ({"client_secret": ""}, 401, "invalid_client", 7000218),
        ({"client_id": "nobody"}, 400, "unauthorized_client", 700016),
        ({"tenant": "elsewhere.example"}, 400, "invalid_request", 90002),
        ({"scope": "https://graph.example/.default"}, 400, "invalid_resource", 500011),
        ({"scope": "Mail.Send"}, 400, "invalid_scope", 1002012),
    ],
)
def test_entra_refuses_as_entra_does(
    shared: Caller, changes: dict[str, str], status: int, error: str, number: int
) -> None:
    """MSAL and people read these fields; each must have Entra's shape."""
    answer = shared.ask_token(**changes)

    problem = answer.json()
    assert (answer.status_code, problem["error"], problem["error_codes"]) == (
        status,
        error,
        [number],
    )
    assert problem["error_description"].startswith(f"AADSTS{number}: ")
    assert "Trace ID: " in problem["error_description"]
    assert {"timestamp", "trace_id", "correlation_id", "error_uri"} <= set(problem)


def test_a_secret_can_expire_and_an_application_be_disabled_while_it_runs(start: Start) -> None:
    """What happens to a tenant overnight must be playable."""
    graph = start()

    graph.simulator.settings(secret_expired=True)
    assert graph.ask_token().json()["error_codes"] == [7000222]
    graph.simulator.settings(client_disabled=True)
    assert graph.ask_token().json()["error_codes"] == [7000112]
    graph.simulator.settings(secret_expired=False, client_disabled=False)
    assert graph.ask_token(tenant="contoso.onmicrosoft.com").status_code == 200


def test_a_client_assertion_must_be_signed_with_the_registered_certificate(
    start: Start, tmp_path: Path
) -> None:
    """A certificate in place of a secret: any other key, audience or end is refused."""
    authority = trustme.CA()
    ours, other = (
        authority.issue_cert("app.contoso.com", key_type=trustme.KeyType.RSA) for _ in range(2)
    )
    ours.cert_chain_pems[0].write_to_path(tmp_path / "app.pem")
    graph = start(certificate=str(tmp_path / "app.pem"))
    endpoint = f"{graph.simulator.url}/{graph.simulator.tenant_id}/oauth2/v2.0/token"

    def ask(certificate: trustme.LeafCert, audience: str = endpoint, seconds: int = 60) -> int:
        ours_id = graph.simulator.client_id
        claims = {"aud": audience, "iss": ours_id, "sub": ours_id, "exp": time.time() + seconds}
        key = certificate.private_key_pem.bytes()
        kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
        return graph.ask_token(
            client_secret="",
            client_assertion_type=kind,
            client_assertion=jwt.encode(claims, key, algorithm="RS256"),
        ).status_code

    assert ask(ours) == 200
    assert ask(other) == 401
    assert ask(ours, audience="https://elsewhere.example/token") == 401
    assert ask(ours, seconds=-60) == 401


def test_tokens_absent_expired_and_revoked_are_refused(start: Start) -> None:
    """Only a 401 tells a worker that its cached token is worth nothing any more."""
    graph = start(token_lifetime=1)
    good = dict(graph.headers)
    until(lambda: graph.send().status_code == 401)
    assert "expired" in graph.send().json()["error"]["message"]

    graph.simulator.settings(token_lifetime=3599)
    graph.sign_in()
    assert graph.send().status_code == 202
    graph.simulator.revoke_tokens()
    revoked = graph.send()
    assert code(revoked) == (401, "InvalidAuthenticationToken")
    assert "authorization_uri" in revoked.headers["WWW-Authenticate"]
    graph.headers.clear()
    assert graph.send().status_code == 401
    assert good["Authorization"].startswith("Bearer ")


@pytest.mark.parametrize(
    ("changes", "status", "wanted"),
    [
        ({"toRecipients": None}, 400, "ErrorInvalidRecipients"),
        ({"toRecipients": [{"emailAddress": {"address": "ann"}}]}, 400, "ErrorInvalidRecipients"),
        ({"toRecipients": [{"address": "a@b.c"}]}, 400, "BadRequest"),
        (
            {"toRecipients": [{"emailAddress": {"address": f"a{n}@b.c"}} for n in range(501)]},
            400,
            "ErrorInvalidRecipients",
        ),
        ({"colour": "red"}, 400, "BadRequest"),
        ({"body": {"contentType": "rtf", "content": ""}}, 400, "BadRequest"),
        (
            {"internetMessageHeaders": [{"name": "Auto-Submitted", "value": "yes"}]},
            400,
            "InvalidInternetMessageHeader",
        ),
        ({"internetMessageHeaders": []}, 400, "InvalidInternetMessageHeaderCollection"),
        (
            {"internetMessageHeaders": [{"name": f"x-{n}", "value": "v"} for n in range(6)]},
            400,
            "InvalidInternetMessageHeaderCollection",
        ),
        (
            {"from": {"emailAddress": {"address": "boss@contoso.com"}}},
            403,
            "ErrorSendAsDenied",
        ),
        ({"subject": "x" * 4 * 1024 * 1024}, 413, "RequestEntityTooLarge"),
    ],
)
def test_a_message_that_graph_would_refuse_is_refused(
    shared: Caller, changes: dict[str, Any], status: int, wanted: str
) -> None:
    """A payload that only the simulator takes would be found out in production."""
    answer = shared.send("refused@contoso.com", **changes)

    assert code(answer) == (status, wanted)
    assert accepted_by(shared, "refused@contoso.com") == 0


def test_mailboxes_unknown_or_out_of_scope_are_told_apart(start: Start) -> None:
    """One is a wrong address, the other an access policy; permission missing is a third."""
    graph = start(out_of_scope=["boss@contoso.com"])

    assert code(graph.send("nobody@example.net")) == (404, "ErrorInvalidUser")
    blocked = graph.send("boss@contoso.com")
    assert code(blocked) == (403, "ErrorAccessDenied")
    assert "[RAOP]" in blocked.json()["error"]["message"]
    graph.simulator.settings(mail_send=False, mail_read=False)
    assert code(graph.send()) == (403, "ErrorAccessDenied")
    refused = graph.http.get(f"/v1.0/users/{MAILBOX}/messages", headers=graph.headers)
    assert code(refused) == (403, "ErrorAccessDenied")


def test_a_mime_mail_is_read_and_bad_base64_refused(start: Start) -> None:
    """The other documented form of sendMail."""
    graph = start()
    headers = graph.headers | {"Content-Type": "text/plain"}
    path = f"/v1.0/users/{MAILBOX}/sendMail"
    text = b"To: Ann <ann@example.org>\r\nSubject: Hi\r\nX-Ours: 7\r\n\r\nHello\r\n"

    assert graph.http.post(path, content=base64.b64encode(text), headers=headers).status_code == 202
    refused = graph.http.post(path, content=b"not base64!", headers=headers)

    assert code(refused) == (400, "ErrorMimeContentInvalidBase64String")
    (row,) = graph.simulator.ledger()
    assert (row["recipients"], row["subject"]) == (["ann@example.org"], "Hi")
    assert row["headers"] == {"X-Ours": "7"}


def test_a_fifth_request_at_once_is_throttled_and_the_mailbox_alone(start: Start) -> None:
    """Four at once per mailbox: the limit the whole gate exists for."""
    graph = start(grace_ms=0)
    graph.simulator.fault("hang_before", 4)

    async def scenario() -> tuple[httpx.Response, httpx.Response]:
        url = f"{graph.simulator.url}/v1.0/users/{{}}/sendMail"
        body = {"message": mail()}
        async with httpx.AsyncClient(verify=graph.trust, headers=graph.headers) as http:
            four = [asyncio.create_task(http.post(url.format(MAILBOX), json=body)) for _ in "1234"]
            await asyncio.to_thread(until, lambda: running(graph) == 4)
            fifth = await http.post(url.format(MAILBOX), json=body)
            other = await http.post(url.format("other@contoso.com"), json=body)
            for task in four:
                task.cancel()
            await asyncio.gather(*four, return_exceptions=True)
            return fifth, other

    fifth, other = asyncio.run(scenario())

    assert code(fifth) == (429, "ApplicationThrottled")
    assert "MailboxConcurrency" in fifth.json()["error"]["message"]
    assert fifth.headers["Retry-After"] == "5"
    assert other.status_code == 202
    assert graph.simulator.stats()["max_concurrent"][MAILBOX] == 5


def running(graph: Caller) -> int:
    """Requests that stand at a fault and have no answer yet."""
    waiting = [entry for entry in graph.simulator.requests() if entry["status"] is None]
    return sum(entry["fault"] is not None for entry in waiting)


def test_no_window_of_requests_is_ever_exceeded_and_its_end_is_told(start: Start) -> None:
    """Any ten minutes, not fixed ones; a caller that waits as told is let in."""
    graph = start(request_limit=3, request_window=1.0, retry_after_form="fraction")
    for _ in range(3):
        assert graph.send().status_code == 202
    told = graph.send()
    assert told.status_code == 429
    assert graph.simulator.stats()["too_early"] == 0

    end = time.monotonic() + float(told.headers["Retry-After"])
    until(lambda: time.monotonic() >= end)
    assert graph.send().status_code == 202

    log = graph.simulator.requests()
    times = [entry["monotonic"] for entry in log if entry["status"] == 202]
    assert times[3] - times[0] >= 1.0


def test_bytes_uploaded_to_a_mailbox_are_limited(start: Start) -> None:
    """150 MB in any five minutes, in small."""
    graph = start(upload_limit=3000, upload_window=60.0)
    body = {"contentType": "text", "content": "x" * 1500}

    assert graph.send(body=body).status_code == 202
    assert graph.send(body=body).status_code == 429
    assert graph.send("other@contoso.com", body=body).status_code == 202


def test_a_call_before_retry_after_has_passed_is_refused_and_counted(start: Start) -> None:
    """A worker that does not wait must be caught by the numbers, not by luck."""
    graph = start(grace_ms=0)
    graph.simulator.fault("throttle", retry_after=60)

    assert graph.send().status_code == 429
    again = graph.send()

    assert again.status_code == 429
    assert 1 <= int(again.headers["Retry-After"]) <= 60
    assert graph.simulator.stats()["too_early"] == 1
    graph.simulator.settings(limits=False)
    assert graph.send().status_code == 202


def test_a_call_that_crossed_with_the_429_is_refused_but_not_held_against_the_caller(
    start: Start,
) -> None:
    """What was on its way when the 429 went out could not know of it."""
    graph = start(grace_ms=60_000)
    graph.simulator.fault("throttle", retry_after=60)

    assert [graph.send().status_code for _ in range(3)] == [429, 429, 429]
    assert graph.simulator.stats()["too_early"] == 0


def test_retry_after_comes_in_every_form_seen_in_the_wild(start: Start) -> None:
    """Whole, fractional, a date, absent, nonsense: a client must live with each."""
    graph = start()

    def told(form: str, mailbox: str) -> str | None:
        graph.simulator.settings(retry_after_form=form)
        graph.simulator.fault("throttle", retry_after=30)
        header: str | None = graph.send(mailbox).headers.get("Retry-After")
        return header

    assert told("integer", "a@contoso.com") == "30"
    assert told("fraction", "b@contoso.com") == "30.000"
    date = told("date", "c@contoso.com")
    assert date is not None
    assert parsedate_to_datetime(date).timestamp() >= time.time()
    assert told("absent", "d@contoso.com") is None
    assert told("nonsense", "e@contoso.com") == "soon"


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [
        ("reset_before_reading", 0),
        ("reset_before", 0),
        ("reset_after", 1),
        ("close_before", 0),
        ("close_after", 1),
        ("cut_in_status", 1),
        ("cut_after_status", 1),
        ("garbage", 0),
        ("garbage_after", 1),
    ],
)
def test_a_broken_answer_leaves_the_caller_in_doubt_and_the_ledger_sure(
    shared: Caller, kind: str, accepted: int
) -> None:
    """The client sees the same failure whether the mail was accepted or not."""
    mailbox = f"{kind}@contoso.com"
    shared.simulator.fault(kind)

    with pytest.raises(httpx.TransportError):
        shared.send(mailbox)

    assert accepted_by(shared, mailbox) == accepted
    assert shared.send(mailbox).status_code == 202


@pytest.mark.parametrize(("kind", "accepted"), [("hang_before", 0), ("hang_after", 1)])
def test_a_hanging_answer_runs_into_the_callers_timeout(
    start: Start, kind: str, accepted: int
) -> None:
    """A read timeout says nothing about the mail."""
    graph = start()
    graph.simulator.fault(kind)
    graph.http.timeout = httpx.Timeout(0.3)

    with pytest.raises(httpx.ReadTimeout):
        graph.send()

    assert len(graph.simulator.ledger()) == accepted


def test_a_mail_can_be_accepted_after_its_sender_gave_up(start: Start) -> None:
    """The worst of the service: a look made too soon finds nothing."""
    graph = start()
    graph.simulator.fault("accept_late", seconds=0.2)
    graph.http.timeout = httpx.Timeout(0.3)

    with pytest.raises(httpx.ReadTimeout):
        graph.send()
    gave_up = time.monotonic()
    until(lambda: len(graph.simulator.ledger()) == 1)

    assert graph.simulator.ledger()[0]["monotonic"] >= gave_up + 0.1


def test_errors_come_before_or_after_acceptance_with_any_body(start: Start) -> None:
    """A 504 that delivered and a 503 that did not look alike."""
    graph = start()
    fault = graph.simulator.fault
    fault("status", status=503, headers={"Retry-After": "7"})
    fault("status_after", status=504)
    fault("status", status=502, body="<html>Bad gateway</html>")
    fault("status", status=400, code="ErrorQuirk", message="Odd.")
    fault("accepted_retry_after", retry_after="3")
    fault("unauthorized")
    fault("slow_body", seconds=0.1)

    answers = [graph.send(marker=f"m-{n}") for n in range(7)]

    assert [answer.status_code for answer in answers] == [503, 504, 502, 400, 202, 401, 202]
    assert answers[0].headers["Retry-After"] == "7"
    assert answers[2].text == "<html>Bad gateway</html>"
    assert code(answers[3]) == (400, "ErrorQuirk")
    assert answers[4].headers["Retry-After"] == "3"
    assert [row["marker"] for row in graph.simulator.ledger()] == ["m-1", "m-4", "m-6"]


def test_a_fault_strikes_only_whom_it_is_meant_for(start: Start) -> None:
    """One bad mailbox or recipient among good ones."""
    graph = start()
    graph.simulator.fault("status", 0, recipient="Bad@example.org", status=400)
    graph.simulator.fault("status", 0, mailbox="sick@contoso.com", status=500)
    bad = [{"emailAddress": {"address": "bad@example.org"}}]

    assert graph.send().status_code == 202
    assert graph.send(toRecipients=bad).status_code == 400
    assert graph.send("sick@contoso.com").status_code == 500
    graph.simulator.clear_faults()
    assert graph.send("sick@contoso.com", toRecipients=bad).status_code == 202


def test_chance_repeats_itself_with_the_same_seed(start: Start) -> None:
    """A failing run can be played again."""
    runs = []
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        graph = start(name, seed=seed)
        graph.simulator.fault("status", 0, probability=0.5, status=500)
        runs.append([graph.send().status_code for _ in range(30)])

    assert runs[0] == runs[1] != runs[2]
    assert set(runs[0]) == {202, 500}


def test_a_fault_can_end_every_token_in_the_middle_of_the_work(start: Start) -> None:
    """A revocation hits whoever comes next with the old token; a new one is good."""
    graph = start()
    graph.simulator.fault("revoked")

    assert code(graph.send()) == (401, "InvalidAuthenticationToken")
    assert graph.send().status_code == 401
    graph.sign_in()
    assert graph.send().status_code == 202


def test_a_hostile_service_mixes_every_misfortune_by_its_seed(start: Start) -> None:
    """Chance finds what no list does, and a seed finds it again. Each kind comes in the end, and
    the ledger holds exactly what was accepted, whatever the caller saw.
    """
    slow = {"hang_before", "hang_after", "slow_body", "accept_late"}
    mix = [name for name in MIX if name not in slow]
    seen = []
    for name in ("one", "two"):
        graph = start(name, seed=5, hostile_percent=80, hostile_mix=mix, limits=False)
        graph.simulator.settings(retry_after=0)
        seen.append([outcome(graph, f"m-{n}") for n in range(120)])
        stats, accepted = graph.simulator.stats(), graph.simulator.ledger()

    assert seen[0] == seen[1]
    assert 70 <= stats["hostile"] <= 110
    assert stats["hostile"] == sum(stats["faults"].values())
    assert set(stats["faults"]) == {MIX[name]["kind"] for name in mix}
    assert len({row["marker"] for row in accepted}) == len(accepted)
    told = {f"m-{n}" for n, what in enumerate(seen[0]) if what == "202"}
    assert told <= {row["marker"] for row in accepted}
    assert len(accepted) > len(told)


def outcome(graph: Caller, marker: str) -> str:
    """What the caller learns of one mail; a token that was ended is renewed."""
    properties = [{"id": PROPERTY, "value": marker}]
    try:
        status = graph.send(singleValueExtendedProperties=properties).status_code
    except httpx.TransportError:
        return "broken"
    if status == 401:
        graph.sign_in()
    return str(status)


def test_searches_meet_misfortunes_too_but_none_that_needs_a_mail(start: Start) -> None:
    """A look into a mailbox may fail like any request, and must not be taken for an answer."""
    graph = start(hostile_percent=100, hostile_mix=["reset_after", "503"])

    answer = graph.http.get(f"/v1.0/users/{MAILBOX}/messages", headers=graph.headers)

    assert answer.status_code == 503
    assert graph.simulator.stats()["faults"] == {"status": 1}


def test_the_token_endpoint_fails_too(start: Start) -> None:
    """Sign-in has outages of its own, some of them not in JSON."""
    graph = start()
    fault = graph.simulator.fault
    fault("token_status", status=503)
    fault("token_status", status=429, body="slow down", headers={"Retry-After": "60"})
    fault("token_garbage")
    fault("token_reset")
    fault("token_delay", seconds=0.2)

    outage, throttled, garbage = (graph.ask_token() for _ in range(3))
    with pytest.raises(httpx.TransportError):
        graph.ask_token()
    before = time.monotonic()
    late = graph.ask_token()

    assert (outage.status_code, outage.json()["error"]) == (503, "temporarily_unavailable")
    assert (throttled.status_code, throttled.text) == (429, "slow down")
    assert garbage.text.startswith("<html>")
    assert late.status_code == 200
    assert time.monotonic() - before >= 0.2
    assert graph.simulator.stats()["token_requests"] == 6
    assert graph.simulator.stats()["tokens_issued"] == 2


def test_a_mail_lies_in_drafts_first_and_then_in_sent_items(start: Start) -> None:
    """A look must search the whole mailbox, because an accepted mail passes through Drafts."""
    graph = start(drafts_seconds=1.0)
    graph.send()
    accepted = graph.simulator.ledger()[0]["time"]

    drafts, sent = graph.look("m-1", "drafts"), graph.look("m-1", "sentitems")
    if time.time() < accepted + 1.0:
        assert [found["isDraft"] for found in drafts] == [True]
        assert sent == []
    until(lambda: bool(graph.look("m-1", "sentitems")))

    assert time.time() >= accepted + 1.0
    assert graph.look("m-1", "drafts") == []
    (found,) = graph.look("m-1")
    assert found["isDraft"] is False


def test_a_search_finds_by_marker_or_message_id_and_nothing_else(start: Start) -> None:
    """Another marker, mailbox or property name must not match."""
    graph = start()
    graph.send(marker="it's")
    graph.send(marker="m-2")
    number = graph.simulator.ledger()[1]["internet_message_id"]

    assert [found["subject"] for found in graph.look("it''s")] == ["Invoice"]
    assert graph.look("m-3") == []
    assert graph.look("m-2", mailbox="other@contoso.com") == []
    by_number = graph.http.get(
        f"/v1.0/users/{MAILBOX}/mailFolders/SentItems/messages",
        params={"$filter": f"internetMessageId eq '{number}'", "$select": "id,isDraft"},
        headers=graph.headers,
    )
    (found,) = by_number.json()["value"]
    assert set(found) == {"id", "isDraft"}


def test_a_search_pages_and_refuses_filters_it_does_not_know(start: Start) -> None:
    """A filter that is silently ignored would find every mail."""
    graph = start()
    for number in range(3):
        graph.send(marker=str(number))
    path = f"/v1.0/users/{MAILBOX}/messages"

    first = graph.http.get(path, params={"$top": "2"}, headers=graph.headers).json()
    rest = graph.http.get(first["@odata.nextLink"], headers=graph.headers).json()
    unknown = graph.http.get(path, params={"$filter": "size gt 5"}, headers=graph.headers)

    assert (len(first["value"]), len(rest["value"])) == (2, 1)
    assert code(unknown) == (400, "BadRequest")


def test_a_mail_not_saved_is_found_nowhere(start: Start) -> None:
    """Without saveToSentItems there is nothing to settle a doubt with."""
    graph = start()

    graph.send(save=False)

    assert graph.look("m-1") == []
    assert len(graph.simulator.ledger()) == 1


def test_a_search_may_find_a_mail_only_later(start: Start) -> None:
    """Indexing takes its time: the first look may miss an accepted mail."""
    graph = start(search_delay=0.5)
    graph.send()
    accepted = graph.simulator.ledger()[0]["time"]

    until(lambda: bool(graph.look("m-1")))

    assert time.time() >= accepted + 0.5
    assert len(graph.simulator.mail(MAILBOX)) == 1


def test_a_mail_to_some_addresses_comes_back_as_a_report_in_the_inbox(start: Start) -> None:
    """Late, with Exchange's class and code, and with the headers of the mail that it is about."""
    graph = start(bounces="ann@example.org=5.1.1,full.example=5.2.2", bounce_seconds=0.5)
    graph.send(marker="m-7")
    accepted = graph.simulator.ledger()[0]["time"]
    inbox = f"/v1.0/users/{MAILBOX}/mailFolders/inbox/messages"
    report = "ep/id eq 'String 0x001A' and ep/value eq 'REPORT.IPM.Note.NDR'"
    reports = f"singleValueExtendedProperties/any(ep: {report})"
    query = {"$orderby": "receivedDateTime",
             "$filter": f"receivedDateTime ge 2026-01-01T00:00:00Z and {reports}"}  # fmt: skip

    def found() -> list[dict[str, Any]]:
        answer = graph.http.get(inbox, params=query, headers=graph.headers)
        value: list[dict[str, Any]] = answer.json()["value"]
        return value

    until(lambda: bool(found()))

    assert time.time() >= accepted + 0.5
    [one] = found()
    assert "550 5.1.1" in one["body"]["content"]
    assert "x-postroom-id: m-7" in one["body"]["content"]
    assert [mail["subject"] for mail in graph.look("m-7")] == ["Invoice"]
    query["$filter"] = f"{reports} and receivedDateTime ge 2026-01-01T00:00:00Z"
    assert code(graph.http.get(inbox, params=query, headers=graph.headers)) == (
        400, "InefficientFilter",
    )  # fmt: skip


def test_the_ledger_survives_a_kill_and_a_restart_continues_it(start: Start) -> None:
    """The witness must not forget: what was answered with 202 is in the file."""
    before = start("same")
    for number in range(20):
        assert before.send(marker=f"m-{number}").status_code == 202
    before.simulator.process.kill()
    before.simulator.process.wait()
    assert len(before.simulator.ledger()) == 20

    after = start("same")
    after.headers = before.headers
    assert after.send(marker="m-20").status_code == 202
    assert [row["n"] for row in after.simulator.ledger()] == list(range(1, 22))
    assert len(after.look("m-7")) == 1


def test_the_ledger_can_be_read_on_from_a_number(start: Start) -> None:
    """A progress bar asks for the news only."""
    graph = start()
    for number in range(3):
        graph.send(marker=f"m-{number}")

    news = graph.simulator.control("GET", "ledger?since=2")

    assert [row["marker"] for row in news] == ["m-2"]


def test_statistics_add_up(start: Start) -> None:
    """The numbers a report rests on."""
    graph = start(latency_ms="1-3")
    for _ in range(3):
        graph.send()
    graph.simulator.fault("status", status=500)
    graph.send("other@contoso.com")

    stats = graph.simulator.stats()

    assert (stats["accepted"], stats["token_requests"], stats["throttled"]) == (3, 1, 0)
    assert stats["statuses"] == {"202": 3, "500": 1}
    assert stats["requests"] == {MAILBOX: 3, "other@contoso.com": 1}
    assert stats["first_acceptance"]["monotonic"] < stats["last_acceptance"]["monotonic"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"latency_ms": "slow"}, "latency_ms: a number of milliseconds or a range"),
        ({"concurrency": 0}, "concurrency: at least 1"),
        ({"limits": "perhaps"}, "limits: yes or no"),
        ({"colour": "red"}, "colour: there is no such setting"),
        ({"hostile_mix": "504_after,rain"}, "hostile_mix: 'rain' is none of throttle, 500"),
        ({"hostile_percent": 101}, "hostile_percent: at most 100"),
        ({"bounces": "gone.example"}, "bounces: gone.example=5.1.1 or the like, not"),
        ({"retry_after_form": "poem"}, "retry_after_form: one of integer"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    """A typing mistake must not become a run with defaults."""
    with pytest.raises(SettingError, match=complaint):
        Simulator(tmp_path, **options)


def test_bad_orders_at_run_time_change_nothing(start: Start) -> None:
    """The control API complains in one line and goes on."""
    graph = start()

    with pytest.raises(ValueError, match="kind: one of status"):
        graph.simulator.fault("flood")
    with pytest.raises(ValueError, match="stauts: status takes"):
        graph.simulator.fault("status", stauts=500)
    with pytest.raises(ValueError, match="grace_ms: a whole number"):
        graph.simulator.settings(grace_ms=-1)
    assert graph.send().status_code == 202


def test_the_command_line_refuses_a_wrong_value_in_one_line() -> None:
    """`postroom simulator` is used by hand."""
    done = subprocess.run(
        [sys.executable, "-m", "worker.simulator", "--latency-ms", "9-1"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=Path(__file__).parents[1],
    )

    assert done.returncode == 2
    assert done.stderr.startswith("postroom simulator: latency_ms: ")
    assert done.stderr.count("\n") == 1


def test_the_simulator_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """A killed test run must not leave servers behind."""
    script = (
        "import os, sys; from worker.simulator import Simulator; "
        "print(Simulator(sys.argv[1]).url, flush=True); os._exit(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    port = urlsplit(done.stdout.strip()).port
    assert port is not None

    until(lambda: not listens(port))


def listens(port: int) -> bool:
    """Does anything take connections there?"""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
