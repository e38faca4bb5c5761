"""Attachments above 3 MB: by a draft and upload sessions, under the same promises."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from tests.post_kit import SENDER, Post, attached, opened
from tests.support import wait_until
from worker.model import Attachment, Message, State
from worker.store.schema import messages, queues

SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
OTHER = "a@contoso.com"
LARGE = os.urandom(9_000_000)  # three ranges


@pytest.fixture
def options() -> dict[str, Any]:
    """What a test asks of the settings and, under `simulator`, of the simulator."""
    return {}


@pytest.fixture
def post(
    tmp_path: Path, redis_url: str, migrated_url: str, options: dict[str, Any]
) -> Iterator[Post]:
    """Everything in one process."""
    with opened(tmp_path, redis_url, migrated_url, **options) as running:
        yield running


def mail(*given: bytes, **fields: Any) -> Message:
    """A message with these attachments."""
    attachments = [Attachment(f"{n}.bin", content) for n, content in enumerate(given)]
    return Message("ada@example.org", "Report", html="<p>x</p>", attachments=attachments, **fields)


def requests(post: Post, *operations: str) -> list[dict[str, Any]]:
    """What was asked of the simulator."""
    return [r for r in post.simulator.requests() if r["operation"] in operations]


def queue(post: Post, *given: bytes) -> str:
    """One message taken in; gives its batch's id."""
    batch_id = post.enqueue(mail(*given)).batch_id
    post.ingest()
    return batch_id


def again(post: Post, mailbox: str = SENDER) -> None:
    """Lets every message that waits be due now, and works the mailbox."""
    past = datetime.now(UTC) - timedelta(hours=1)
    with post.runtime.store.engine.begin() as connection:
        connection.execute(
            update(messages).where(messages.c.state == State.QUEUED).values(due_at=past)
        )
        connection.execute(update(queues).values(next_due_at=past))
    for key in post.runtime.redis.scan_iter("postroom:{*}:gate"):
        post.runtime.redis.hdel(key, "cool", "trouble")
    post.deliver(mailbox)


def contents(post: Post, batch_id: str) -> list[bytes]:
    """The attachments of the one mail that came of a batch."""
    assert len(post.simulator.ledger()) == 1
    [found] = post.mails(batch_id)
    assert found["isDraft"] is False
    return [content for _, _, content, _ in attached(found)]


def test_large_attachments_go_by_a_draft_and_arrive_as_they_were(post: Post) -> None:
    """A large file, a small one and an inline image, in their order; headers and all."""
    given = [
        Attachment("film.mp4", LARGE), Attachment("note.txt", b"small"),
        Attachment("logo.png", b"\x89PNG", content_id="logo"),
    ]  # fmt: skip
    [found] = post.send(
        Message(["ada@example.org", ("Bob", "bob@example.org")], "Film", html="<p>ü</p>",
                attachments=given, headers={"x-order": "17"}, importance="high",
                reply_to=("Desk", "desk@contoso.com"), list_unsubscribe="<mailto:u@contoso.com>")
    )  # fmt: skip

    assert attached(found) == [
        ("film.mp4", "video/mp4", LARGE, None), ("note.txt", "text/plain", b"small", None),
        ("logo.png", "image/png", b"\x89PNG", "logo"),
    ]  # fmt: skip
    assert found["isDraft"] is False
    assert found["importance"] == "high"
    assert {"name": "x-order", "value": "17"} in found["internetMessageHeaders"]
    [entry] = post.simulator.ledger()
    assert entry["recipients"] == ["ada@example.org", "bob@example.org"]
    uploads = requests(post, "upload")
    assert [r["status"] for r in uploads] == [200, 200, 201]
    assert post.simulator.stats()["throttled"] == 0


@SQLITE
@pytest.mark.parametrize(
    ("kind", "nth"),
    [("reset_before", 1), ("reset_after", 1), ("cut_upload", 1), ("status", 1), ("reset_after", 3)],
)
def test_an_upload_goes_on_where_it_broke(post: Post, kind: str, nth: int) -> None:
    """Before, after and in the middle of a range, the first or the last: no byte is lost, and
    what had arrived is not sent again."""
    batch_id = queue(post, LARGE)
    limit = {"status": 503} if kind == "status" else {}
    # The simulator counts what it strikes: the first ranges pass by a fault that never strikes.
    if nth == 1:
        post.simulator.fault(kind, operation="upload", **limit)
        post.deliver()
    else:
        done = threading.Event()

        def order() -> None:
            wait_until(lambda: len(requests(post, "upload")) >= 2, "two ranges arrived", 60)
            post.simulator.fault(kind, operation="upload", **limit)
            done.set()

        post.simulator.settings(latency_ms="400")
        thread = threading.Thread(target=order)
        thread.start()
        post.deliver()
        thread.join()
        post.simulator.settings(latency_ms="0")
    if post.message(batch_id)["state"] != State.SENT:
        again(post)
    assert contents(post, batch_id) == [LARGE]
    assert len(requests(post, "upload")) <= 8


@SQLITE
@pytest.mark.parametrize("kind", ["reset_before", "reset_after", "status", "status_after"])
def test_a_draft_whose_answer_was_lost_is_found_again(post: Post, kind: str) -> None:
    """No mail was sent by it: no doubt, no try; the next claim goes on with the same draft."""
    post.simulator.fault(kind, operation="draft")
    batch_id = queue(post, LARGE)
    post.deliver()
    if post.message(batch_id)["state"] != State.SENT:
        again(post)

    message = post.message(batch_id)
    assert (message["state"], message["doubt"], message["tries"]) == (State.SENT, False, 0)
    assert [a["outcome"] for a in message["attempts"]] == ["notsent", "accepted"]
    assert contents(post, batch_id) == [LARGE]
    drafts = [m for m in post.simulator.mail(SENDER) if m["isDraft"]]
    assert drafts == []


@SQLITE
@pytest.mark.parametrize("kind", ["reset_after", "status_after", "reset_before"])
def test_only_the_send_leaves_doubt(post: Post, kind: str) -> None:
    """A lost answer to /send: unknown, and nothing is sent again behind anyone's back."""
    post.simulator.fault(kind, operation="send")
    batch_id = queue(post, LARGE)
    post.deliver()
    message = post.message(batch_id)
    assert (message["state"], message["doubt"]) == (State.UNKNOWN, True)
    again(post)
    assert len(requests(post, "send")) == 1
    assert len(post.simulator.ledger()) == (0 if kind == "reset_before" else 1)


@SQLITE
@pytest.mark.parametrize("body", ["<html>Sign in, please", {"id": "x"}, {"isDraft": None}])
def test_only_a_whole_answer_says_that_a_draft_was_sent(post: Post, body: Any) -> None:
    """A 200 that is cut, or somebody else's, proves nothing: what was never sent is not `sent`."""
    batch_id = queue(post, LARGE)
    post.simulator.fault("status", 0, operation="upload")
    post.deliver()
    assert post.message(batch_id)["state"] == State.QUEUED
    post.simulator.clear_faults()
    post.simulator.fault("status", 0, operation="draft", status=200, body=body)
    post.simulator.fault("status", 0, operation="read", status=200, body=body)
    again(post)
    assert post.simulator.ledger() == []
    assert post.message(batch_id)["state"] == State.QUEUED


@SQLITE
@pytest.mark.parametrize("limit", [
    {"status": 405}, {"status": 400}, {"status": 501}, {"status": 200, "body": {"value": []}},
])  # fmt: skip
def test_a_session_that_does_not_say_where_it_goes_on_is_begun_anew(
    post: Post, limit: dict[str, Any]
) -> None:
    """Only its own documents promise that it can be asked."""
    batch_id = queue(post, LARGE)
    post.simulator.fault("reset_after", operation="upload")
    post.simulator.fault("status", operation="upload", **limit)
    post.deliver()
    if post.message(batch_id)["state"] != State.SENT:
        again(post)
    assert contents(post, batch_id) == [LARGE]


@SQLITE
@pytest.mark.parametrize("limit", [
    {"status": 413}, {"status": 400, "code": "ErrorMessageSizeExceeded"},
    {"status": 400, "code": "ErrorVirusDetected"},
])  # fmt: skip
def test_what_is_refused_for_good_while_it_is_uploaded_fails_at_once(
    post: Post, limit: dict[str, Any]
) -> None:
    """No other range and no other session would change it."""
    batch_id = queue(post, LARGE)
    post.simulator.fault("status", 0, operation="upload", **limit)
    post.deliver()
    assert post.message(batch_id)["state"] == State.FAILED
    assert len(requests(post, "upload")) == 1


@SQLITE
def test_an_upload_that_is_told_to_wait_waits(post: Post) -> None:
    """503 with a Retry-After to a range: nothing more is asked of the mailbox before."""
    batch_id = queue(post, LARGE)
    post.simulator.fault("status", 1, operation="upload", headers={"Retry-After": "30"})
    post.deliver()
    assert post.message(batch_id)["state"] == State.QUEUED
    assert len(requests(post, "upload")) == 1


@SQLITE
@pytest.mark.parametrize("body", ["<html>Sign in, please", {"nextExpectedRanges": []}])
def test_no_mail_goes_without_its_attachment(post: Post, body: Any) -> None:
    """Only 201 says that a range was the last one: anything else is looked at before the send."""
    batch_id = queue(post, LARGE[:3_200_000])
    post.simulator.fault("status", 1, operation="upload", status=200, body=body)
    post.deliver()
    if post.message(batch_id)["state"] != State.SENT:
        again(post)
    assert contents(post, batch_id) == [LARGE[:3_200_000]]


@SQLITE
def test_a_draft_that_is_gone_at_its_send_is_doubt(post: Post) -> None:
    """404 ErrorItemNotFound on /send: somebody sent it, or took it away; nobody can tell."""
    post.simulator.fault("status", operation="send", status=404, code="ErrorItemNotFound")
    batch_id = queue(post, LARGE)
    post.deliver()
    assert post.message(batch_id)["state"] == State.UNKNOWN


@SQLITE
@pytest.mark.parametrize("options", [{"simulator": {"mail_read_write": False}}])
def test_without_mail_readwrite_the_error_says_so(post: Post) -> None:
    """The message fails with a code of its own, the mailbox goes on, a retry mends it."""
    batch_id = queue(post, LARGE)
    post.deliver()
    message = post.message(batch_id)
    assert (message["state"], message["error_code"]) == (State.FAILED, "NeedsMailReadWrite")
    assert "Mail.ReadWrite" in message["attempts"][0]["detail"]
    small = queue(post, b"small")
    post.deliver()
    assert post.message(small)["state"] == State.SENT

    post.simulator.settings(mail_read_write=True)
    post.client.retry(batch_id)
    again(post)
    assert post.message(batch_id)["state"] == State.SENT


@SQLITE
@pytest.mark.parametrize("options", [{"pools": {"all": [OTHER, SENDER]},
                                      "simulator": {"out_of_scope": [OTHER]}}])  # fmt: skip
def test_a_draft_binds_a_message_to_its_mailbox_unless_that_is_barred(post: Post) -> None:
    """Another mailbox of the pool does not take over what is being uploaded; where the mailbox
    may not be used, another goes on."""
    receipt = post.enqueue(mail(LARGE), sender=None, pool="all")
    post.ingest()
    post.deliver(OTHER)
    assert post.message(receipt.batch_id)["state"] == State.QUEUED, "barred: no fault of its own"
    post.runtime.settings.__dict__["request_timeout"] = timedelta(seconds=89.5)
    again(post)
    uploading = post.message(receipt.batch_id)
    assert (uploading["state"], uploading["mailbox"]) == (State.QUEUED, SENDER)
    before = uploading["attempts"]

    again(post, OTHER)
    assert post.message(receipt.batch_id)["attempts"] == before
    post.runtime.settings.__dict__["request_timeout"] = timedelta(seconds=60)
    again(post)
    assert contents(post, receipt.batch_id) == [LARGE]


@SQLITE
@pytest.mark.parametrize("options", [{"simulator": {"message_limit": 5_000_000}}])
def test_what_the_mailbox_does_not_take_fails(post: Post) -> None:
    """ErrorMessageSizeExceeded is the message's own fault."""
    batch_id = queue(post, LARGE)
    post.deliver()
    message = post.message(batch_id)
    assert (message["state"], message["error_code"]) == (State.FAILED, "ErrorMessageSizeExceeded")


@SQLITE
@pytest.mark.parametrize("options", [{"lease": "6s", "request_timeout": "4500ms",
                                      "simulator": {"latency_ms": "150"}}])  # fmt: skip
def test_an_upload_that_outlives_its_claim_goes_on_under_the_next(post: Post) -> None:
    """The lease allows a second and a half: several claims, one draft, no range twice."""
    batch_id = queue(post, LARGE, LARGE[1:])
    wait_until(lambda: post.deliver() and post.message(batch_id)["state"] == State.SENT,
               "it is sent", 60)  # fmt: skip
    assert contents(post, batch_id) == [LARGE, LARGE[1:]]
    message = post.message(batch_id)
    assert len(message["attempts"]) > 1
    assert {a["code"] for a in message["attempts"][:-1]} <= {"Uploading", "LeaseNearlyOver"}
    assert message["tries"] == 0
    puts = [r for r in requests(post, "upload") if r["status"] in {200, 201}]
    assert len(puts) <= 6 + len(message["attempts"]), "a range each, and a look at each resume"


@SQLITE
@pytest.mark.parametrize("options", [{"mailbox_upload_rate": "5MB/2s", "simulator": {
    "upload_limit": 5_000_000, "upload_window": 2}}])  # fmt: skip
def test_uploads_keep_to_the_mailbox_s_window(post: Post) -> None:
    """A message larger than the window waits between its ranges, and is never throttled."""
    batch_id = queue(post, LARGE)

    def sent() -> bool:
        post.deliver()
        return bool(post.message(batch_id)["state"] == State.SENT)

    wait_until(sent, "it is sent", 60)
    assert contents(post, batch_id) == [LARGE]
    codes = {a["code"] for a in post.message(batch_id)["attempts"]}
    assert codes == {"GateClosed", None}
    assert post.simulator.stats()["throttled"] == 0


@SQLITE
def test_large_messages_upload_beside_each_other(post: Post) -> None:
    """Four at once share the mailbox's slots, and small ones go on beside them."""
    post.simulator.settings(latency_ms="20")
    large = post.enqueue(*[mail(LARGE) for _ in range(5)])
    small = post.enqueue(*[mail(b"x") for _ in range(5)])
    post.ingest()
    wait_until(lambda: post.deliver() and len(post.simulator.ledger()) == 10, "all are sent", 60)
    for receipt, content in ((large, LARGE), (small, b"x")):
        found = [attached(m)[0][2] == content for m in post.mails(receipt.batch_id)]
        assert found == [True] * 5
    stats = post.simulator.stats()
    assert stats["throttled"] == 0
    assert stats["max_concurrent"][SENDER] <= 4


@SQLITE
def test_a_crash_before_the_send_leaves_no_doubt(post: Post) -> None:
    """The claim's worker is killed while it uploads: the next one goes on, with the same draft."""
    batch_id = queue(post, LARGE)
    post.simulator.fault("hang_before", operation="upload")
    begin_delivery(post)
    wait_until(lambda: requests(post, "upload"), "an upload has begun", 30)
    _lose(post)
    assert post.runtime.store.end_leases(resend=False, max_attempts=6) == 1
    message = post.message(batch_id)
    assert (message["state"], message["doubt"], message["tries"]) == (State.QUEUED, False, 0)
    assert message["attempts"][0]["outcome"] == "notsent"
    post.simulator.clear_faults()


@SQLITE
def test_a_crash_after_the_release_is_doubt(post: Post) -> None:
    """From the moment that Graph may have been asked, nobody knows."""
    batch_id = queue(post, LARGE)
    post.simulator.fault("hang_after", operation="send")
    begin_delivery(post)
    wait_until(lambda: requests(post, "send"), "the send has begun", 30)
    _lose(post)
    assert post.runtime.store.end_leases(resend=False, max_attempts=6) == 1
    assert post.message(batch_id)["state"] == State.UNKNOWN


def begin_delivery(post: Post) -> None:
    """Works the mailbox in a thread that ends when the runtime is closed under it."""

    def work() -> None:
        with suppress(Exception):
            post.deliver()

    threading.Thread(target=work, daemon=True).start()


def _lose(post: Post) -> None:
    """Lets the leases of all claims have run out."""
    past = datetime.now(UTC) - timedelta(minutes=1)
    with post.runtime.store.engine.begin() as connection:
        connection.execute(
            update(messages).where(messages.c.state == State.SENDING).values(lease_until=past)
        )
