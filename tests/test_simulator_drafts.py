"""The simulator's drafts and upload sessions, against Microsoft's documented rules."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Iterator
from email.message import EmailMessage
from typing import Any

import httpx
import pytest

from worker.simulator import Simulator

PROPERTY = "String {5f1d9c0e-54a7-4d8e-9d0c-2b6a1f0c7e11} Name PostroomId"
IMMUTABLE = {"Prefer": 'IdType="ImmutableId"'}
MEBIBYTE = 1024 * 1024


class Caller:
    """A client of one simulator, for one mailbox."""

    def __init__(self, simulator: Simulator, mailbox: str) -> None:
        self.simulator = simulator
        trust = ssl.create_default_context(cafile=simulator.ca_bundle)
        self.plain = httpx.Client(verify=trust, timeout=20, trust_env=False)
        form = {
            "grant_type": "client_credentials", "client_id": simulator.client_id,
            "client_secret": simulator.client_secret,
            "scope": "https://graph.microsoft.com/.default",
        }  # fmt: skip
        login = f"{simulator.url}/{simulator.tenant_id}/oauth2/v2.0/token"
        token = self.plain.post(login, data=form).json()["access_token"]
        self.http = httpx.Client(
            verify=trust, base_url=f"{simulator.url}/v1.0/users/{mailbox}", timeout=20,
            trust_env=False, headers={"Authorization": f"Bearer {token}"},
        )  # fmt: skip
        self.mailbox = mailbox

    def draft(self, headers: dict[str, str] | None = None, **changes: Any) -> Any:
        """A draft with a marker."""
        message = {
            "subject": "Report", "body": {"contentType": "html", "content": "<p>x</p>"},
            "toRecipients": [{"emailAddress": {"address": "ann@example.org"}}],
            "singleValueExtendedProperties": [{"id": PROPERTY, "value": "m-1"}],
        } | changes  # fmt: skip
        answer = self.http.post("/messages", json=message, headers=headers or IMMUTABLE)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def session(self, draft: Any, size: int, **more: Any) -> Any:
        """An upload session of a draft."""
        item = {"attachmentType": "file", "name": "r.pdf", "size": size} | more
        path = f"/messages/{draft['id']}/attachments/createUploadSession"
        answer = self.http.post(path, json={"AttachmentItem": item})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def put(self, url: str, content: bytes, begin: int, total: int, **headers: str) -> Any:
        """One range."""
        span = f"bytes {begin}-{begin + len(content) - 1}/{total}"
        return self.plain.put(url, content=content, headers={"Content-Range": span} | headers)


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator(tmp_path_factory.mktemp("drafts"), send_as="boss@contoso.com") as running:
        yield running


@pytest.fixture
def caller(simulator: Simulator, request: pytest.FixtureRequest) -> Iterator[Caller]:
    """A caller with a mailbox of the test's own."""
    found = Caller(simulator, f"{abs(hash(request.node.name))}@contoso.com")
    yield found
    found.http.close()
    found.plain.close()
    simulator.clear_faults()
    simulator.settings(mail_read_write=True, mail_read=True, immutable_ids=True)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_draft_is_sent_once_and_keeps_its_immutable_id(caller: Caller) -> None:
    """Nothing is in the ledger before /send; afterwards the id names the mail in Sent Items."""
    before = len(caller.simulator.ledger())
    draft = caller.draft()
    assert draft["isDraft"] is True
    assert len(caller.simulator.ledger()) == before

    assert caller.http.post(f"/messages/{draft['id']}/send").status_code == 202

    [row] = caller.simulator.ledger()[before:]
    assert row["marker"] == "m-1"
    assert row["internet_message_id"] == draft["internetMessageId"]
    there = caller.http.get(f"/messages/{draft['id']}", params={"$select": "isDraft"}).json()
    assert there["isDraft"] is False
    again = caller.http.post(f"/messages/{draft['id']}/send")
    assert code(again) == (404, "ErrorItemNotFound")
    assert len(caller.simulator.ledger()) == before + 1


def test_an_ordinary_id_is_another_one_once_the_draft_is_sent(caller: Caller) -> None:
    """Without Prefer, or where the service does not hold to it."""
    draft = caller.draft(headers={"Prefer": "x"})
    caller.http.post(f"/messages/{draft['id']}/send")
    assert caller.http.get(f"/messages/{draft['id']}").status_code == 404


def test_a_search_finds_drafts_and_says_that_they_are(caller: Caller) -> None:
    """By the marker, before and after; a deleted draft is gone."""
    draft = caller.draft()
    query = (f"singleValueExtendedProperties/any(ep: ep/id eq '{PROPERTY}' and "
             "ep/value eq 'm-1')")  # fmt: skip
    found = caller.http.get("/messages", params={"$filter": query}).json()["value"]
    assert [(m["id"], m["isDraft"]) for m in found] == [(draft["id"], True)]
    assert caller.http.delete(f"/messages/{draft['id']}").status_code == 204
    assert caller.http.get("/messages", params={"$filter": query}).json()["value"] == []


def test_small_attachments_are_added_to_a_draft(caller: Caller) -> None:
    """What was posted is listed, and stands in the mail."""
    draft = caller.draft()
    attachment = {"@odata.type": "#microsoft.graph.fileAttachment", "name": "a.txt",
                  "contentType": "text/plain", "contentBytes": base64.b64encode(b"abc").decode(),
                  "contentId": "c1", "isInline": True}  # fmt: skip
    path = f"/messages/{draft['id']}/attachments"
    assert caller.http.post(path, json=attachment).status_code == 201
    [listed] = caller.http.get(path, params={"$select": "name,size"}).json()["value"]
    assert (listed["name"], listed["size"]) == ("a.txt", 3)
    bad = attachment | {"contentBytes": "%%"}
    assert code(caller.http.post(path, json=bad)) == (400, "BadRequest")
    caller.http.post(f"/messages/{draft['id']}/send")
    [mail] = caller.simulator.mail(caller.mailbox)
    assert base64.b64decode(mail["attachments"][0]["contentBytes"]) == b"abc"


def test_an_upload_session_takes_its_ranges_in_order(caller: Caller) -> None:
    """As documented: 200 with the next range, 201 with a Location; what is out of order is not."""
    draft, content = caller.draft(), bytes(range(256)) * 20_000
    session = caller.session(draft, len(content), isInline=True, contentId="c", contentType="a/b")
    url, total = session["uploadUrl"], len(content)
    assert session["nextExpectedRanges"] == ["0-"]

    assert caller.put(url, content[:5], 3, total).status_code == 416
    assert caller.put(url, content[: 4 * MEBIBYTE], 0, total).json()["nextExpectedRanges"] == [
        str(4 * MEBIBYTE)
    ]
    assert caller.put(url, content[: 4 * MEBIBYTE], 0, total).status_code == 416
    assert caller.plain.get(url).json()["nextExpectedRanges"] == [f"{4 * MEBIBYTE}-"]
    last = caller.put(url, content[4 * MEBIBYTE :], 4 * MEBIBYTE, total)

    assert last.status_code == 201
    assert "/attachments/" in last.headers["Location"]
    assert caller.plain.get(url).status_code == 404
    caller.http.post(f"/messages/{draft['id']}/send")
    [mail] = caller.simulator.mail(caller.mailbox)
    [there] = mail["attachments"]
    assert base64.b64decode(there["contentBytes"]) == content
    assert (there["isInline"], there["contentId"], there["contentType"]) == (True, "c", "a/b")


@pytest.mark.parametrize(
    ("content", "span", "status"),
    [
        (bytes(10), "bytes 0-8/20", 400), (bytes(10), "bytes 0-9/21", 400), (b"x", "", 400),
        (bytes(21), "bytes 0-20/20", 400), (bytes(4 * MEBIBYTE + 1), "bytes 0-4194304/20", 413),
    ],
)  # fmt: skip
def test_a_range_that_does_not_fit_is_refused(
    caller: Caller, content: bytes, span: str, status: int
) -> None:
    """Content-Range must say what is there; 4 MB are the most."""
    url = caller.session(caller.draft(), 20)["uploadUrl"]
    answer = caller.plain.put(url, content=content, headers={"Content-Range": span})
    assert answer.status_code == status


def test_the_address_of_a_session_is_the_leave_to_write(caller: Caller) -> None:
    """An Authorization header is refused, an expired or unknown session is not there."""
    url = caller.session(caller.draft(), 20)["uploadUrl"]
    assert caller.put(url, b"x", 0, 20, Authorization="Bearer t").status_code == 401
    assert caller.put(url.replace("Sessions/", "Sessions/x"), b"x", 0, 20).status_code == 404
    caller.simulator.settings(upload_lifetime=0)
    url = caller.session(caller.draft(), 20)["uploadUrl"]
    caller.simulator.settings(upload_lifetime=3600)
    assert caller.put(url, b"x", 0, 20).status_code == 404
    url = caller.session(caller.draft(), 20)["uploadUrl"]
    assert caller.plain.delete(url).status_code == 204
    assert caller.put(url, b"x", 0, 20).status_code == 404


def test_faults_strike_uploads_before_after_and_in_the_middle(caller: Caller) -> None:
    """After a break, nextExpectedRanges says how much arrived."""
    url = caller.session(caller.draft(), 100)["uploadUrl"]
    begin = 0
    for kind, there in (("reset_before", 0), ("reset_after", 20), ("cut_upload", 30)):
        caller.simulator.fault(kind, operation="upload", mailbox=caller.mailbox)
        with pytest.raises(httpx.TransportError):
            caller.put(url, bytes(20), begin, 100)
        assert caller.plain.get(url).json()["nextExpectedRanges"] == [f"{there}-"]
        begin = there


def test_drafts_need_mail_readwrite_and_sizes_have_limits(caller: Caller) -> None:
    """403 without the permission; reading is enough for looking; too large is refused early."""
    draft = caller.draft()
    caller.simulator.settings(mail_read_write=False)
    path = f"/messages/{draft['id']}/attachments"
    assert code(caller.http.post("/messages", json={})) == (403, "ErrorAccessDenied")
    assert code(caller.http.post(path, json={})) == (403, "ErrorAccessDenied")
    assert caller.http.get(path).status_code == 200
    caller.simulator.settings(mail_read=False)
    assert caller.http.get(path).status_code == 403
    caller.simulator.settings(mail_read_write=True)
    assert caller.http.get(path).status_code == 200

    item = {"attachmentType": "file", "name": "r", "size": 150 * MEBIBYTE + 1}
    answer = caller.http.post(f"{path}/createUploadSession", json={"AttachmentItem": item})
    assert code(answer) == (413, "ErrorAttachmentSizeLimitExceeded")
    caller.simulator.settings(message_limit=35 * MEBIBYTE)
    item["size"] = 36 * MEBIBYTE
    answer = caller.http.post(f"{path}/createUploadSession", json={"AttachmentItem": item})
    assert code(answer) == (413, "ErrorMessageSizeExceeded")
    caller.simulator.settings(message_limit=150 * MEBIBYTE)


def test_a_draft_may_have_no_recipients_but_is_not_sent_without(caller: Caller) -> None:
    """And a wrong draft is refused as a wrong mail is."""
    draft = caller.draft(toRecipients=[])
    answer = caller.http.post(f"/messages/{draft['id']}/send")
    assert code(answer) == (400, "ErrorInvalidRecipients")
    assert caller.http.post("/messages", json={"subjct": "x"}).status_code == 400
    assert caller.http.post("/messages/none/send").status_code == 404


def test_mime_becomes_a_mail_with_its_parts(caller: Caller) -> None:
    """Body, attachments, inline image, reply-to; as sendMail and as a draft."""
    mail = EmailMessage()
    mail["Subject"], mail["To"], mail["Reply-To"] = "Grüße", "ann@example.org", "desk@contoso.com"
    mail.set_content("plain")
    mail.add_alternative("<p>html</p>", subtype="html")
    mail.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="a.pdf")
    body = base64.b64encode(mail.as_bytes())
    headers = {"Content-Type": "text/plain"}
    assert caller.http.post("/sendMail", content=body, headers=headers).status_code == 202
    draft = caller.http.post("/messages", content=body, headers=headers)
    assert draft.status_code == 201
    sent, kept = caller.simulator.mail(caller.mailbox)
    for found in (sent, kept):
        assert found["subject"] == "Grüße"
        assert found["body"] == {"contentType": "html", "content": "<p>html</p>\n"}
        assert found["replyTo"][0]["emailAddress"]["address"] == "desk@contoso.com"
        [attachment] = found["attachments"]
        assert base64.b64decode(attachment["contentBytes"]) == b"%PDF"
    assert (sent["isDraft"], kept["isDraft"]) == (False, True)
