"""Attachments: checked at the door, each content stored once, sent as they were."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from tests.post_kit import Desk, Post, attached, close, opened
from worker.config import Settings
from worker.model import PART, Attachment, InboxFull, InvalidMessages, Message, State
from worker.runtime import Runtime
from worker.store.schema import content_parts, contents

SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The directory below which files may be named."""
    (tmp_path / "root" / "june").mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def post(tmp_path: Path, redis_url: str, migrated_url: str, root: Path) -> Iterator[Post]:
    """Everything in one process."""
    with opened(tmp_path, redis_url, migrated_url, attachment_root=root) as running:
        yield running


@pytest.fixture
def desk(redis_url: str, migrated_url: str, root: Path) -> Iterator[Desk]:
    """A producer and the way into SQL, without Microsoft's side."""
    running = Desk(
        Runtime(Settings(redis_url=redis_url, database_url=migrated_url, attachment_root=root))
    )
    yield running
    close(running.runtime)


def mail(**fields: Any) -> Message:
    """A message to one person."""
    return Message(**{"to": "ada@example.org", "subject": "News", "html": "<p>x</p>"} | fields)


def refusals(post: Desk, *given: Any) -> list[tuple[str, str]]:
    """(code, path) of what the door says against these attachments."""
    with pytest.raises(InvalidMessages) as caught:
        post.enqueue(mail(attachments=list(given)))
    assert post.runtime.redis.dbsize() == 0, "nothing of a refused message is in Redis"
    assert all("\n" not in str(p) and len(str(p)) < 300 for p in caught.value.problems)
    return [(p.code, p.path) for p in caught.value.problems]


def count(post: Desk, table: Any) -> int:
    """Rows of a table."""
    with post.runtime.store.engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def test_files_and_inline_images_arrive_as_they_were(post: Post, root: Path) -> None:
    """Bytes, a file by its path, an image that the HTML refers to; names, types, ids."""
    (root / "june" / "rechnung.pdf").write_bytes(b"%PDF-1.7 \x00\xff")
    given = [
        Attachment("größe.txt", "Grüße".encode(), "text/plain"),
        Attachment("invoice.pdf", path="june/rechnung.pdf"),
        Attachment("logo.png", PNG, content_id="logo@contoso"),
    ]

    [found] = post.send(mail(html='<img src="cid:logo@contoso">', attachments=given))

    assert attached(found) == [
        ("größe.txt", "text/plain", "Grüße".encode(), None),
        ("invoice.pdf", "application/pdf", b"%PDF-1.7 \x00\xff", None),
        ("logo.png", "image/png", PNG, "logo@contoso"),
    ]
    assert found["body"]["content"] == '<img src="cid:logo@contoso">'


def test_a_content_is_stored_once_and_travels_once(post: Post) -> None:
    """Fifty messages and two batches share a logo: one content in SQL, one in Redis."""
    logo = os.urandom(PART + 5)
    many = [mail(to=f"p{n}@example.org", attachments=[Attachment("l", logo)]) for n in range(50)]

    first = post.enqueue(*many)
    post.enqueue(mail(attachments=[Attachment("logo.png", bytes(logo))]))

    assert post.runtime.parts.waiting() == 2, "two parts"
    assert int(post.runtime.redis.get("postroom:inbox:bytes") or 0) < 40_000
    post.ingest()
    assert (count(post, contents), count(post, content_parts)) == (1, 2)
    assert post.runtime.parts.waiting() == 0
    post.enqueue(mail(attachments=[Attachment("again.png", logo)]))
    assert post.runtime.parts.waiting() == 0, "it came a moment ago"
    post.ingest()
    post.deliver()
    assert [attached(m)[0][2] == logo for m in post.mails(first.batch_id)] == [True] * 50


def test_the_file_is_taken_as_it_was_when_it_was_enqueued(post: Post, root: Path) -> None:
    """What becomes of the file afterwards changes nothing."""
    (root / "a.txt").write_bytes(b"then")
    receipt = post.enqueue(mail(attachments=[Attachment("a.txt", path=root / "a.txt")]))
    (root / "a.txt").write_bytes(b"now")
    post.ingest()
    post.deliver()
    [found] = post.mails(receipt.batch_id)
    assert attached(found)[0][2] == b"then"


@SQLITE
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("absent.txt", "ATT_MISSING"), ("june", "ATT_MISSING"), ("june/absent.txt", "ATT_MISSING"),
        ("/etc/hostname", "ATT_PATH"), ("../secret", "ATT_PATH"), ("june/../../secret", "ATT_PATH"),
        ("link", "ATT_LINK"), ("way/secret", "ATT_LINK"), ("", "ATT_PATH"), (".", "ATT_PATH"),
        ("pipe", "ATT_MISSING"), ("a\x00b", "CTRL_CHAR"), (b"bytes", "TYPE"),
        ("empty", "ATT_EMPTY"), ("large", "ATT_SIZE"), (f"{'x' * 300}", "ATT_MISSING"),
    ],
)  # fmt: skip
def test_a_path_leads_nowhere_but_below_the_root(
    desk: Desk, root: Path, path: Any, code: str
) -> None:
    """Outside, through links, to what is no file: refused in one line, and nothing is kept."""
    (root.parent / "secret").write_text("secret")
    (root / "link").symlink_to(root.parent / "secret")
    (root / "way").symlink_to(root.parent)
    os.mkfifo(root / "pipe")
    (root / "empty").touch()
    with (root / "large").open("wb") as file:
        file.truncate(150 * 1024 * 1024 + 1)
    assert refusals(desk, Attachment("a", path=path)) == [(code, "attachments[0]")]


@SQLITE
@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"name": ""}, "ATT_NAME"), ({"name": "a/b"}, "ATT_NAME"), ({"name": "..\\b"}, "ATT_NAME"),
        ({"name": "a\r\nb"}, "ATT_NAME"), ({"name": "x\u202efdp.exe"}, "ATT_NAME"),
        ({"name": "x" * 256}, "ATT_NAME"), ({"name": None}, "TYPE"), ({"name": b"x"}, "TYPE"),
        ({"content": "text"}, "TYPE"), ({"content": None}, "ATT_CONTENT"),
        ({"path": "a"}, "ATT_CONTENT"), ({"content": b""}, "ATT_EMPTY"), ({"nmae": "x"}, "FIELD"),
        ({"content_type": "foo"}, "ATT_CTYPE"), ({"content_type": "text/x\r\nX: y"}, "ATT_CTYPE"),
        ({"content_type": "text/plain; charset=x"}, "ATT_CTYPE"), ({"content_type": 1}, "TYPE"),
        ({"content_id": "<a>"}, "ATT_CID"), ({"content_id": "a b"}, "ATT_CID"),
        ({"content_id": ""}, "ATT_CID"), ({"content_id": 5}, "ATT_CID"),
    ],
)  # fmt: skip
def test_a_bad_attachment_is_refused_with_its_code(
    desk: Desk, fields: dict[str, Any], code: str
) -> None:
    """One bad field gives one problem, in its place."""
    given = {"name": "a.txt", "content": b"x"} | fields
    assert refusals(desk, {"name": "b.txt", "content": b"y"}, given) == [(code, "attachments[1]")]


@SQLITE
def test_what_may_not_be_together_is_refused(desk: Desk) -> None:
    """Too many, too much in all, a content id twice; a draft cannot be left unsaved."""
    one = Attachment("a", b"x")
    inline = Attachment("a", b"x", content_id="c")
    assert refusals(desk, *[one] * 251) == [("ATT_COUNT", "attachments")]
    assert refusals(desk, inline, inline) == [("ATT_CID", "attachments")]
    large = Attachment("a", bytes(80 * 1024 * 1024))
    assert refusals(desk, large, large) == [("ATT_TOTAL", "attachments")]
    with pytest.raises(InvalidMessages, match="SAVE_DRAFT"):
        desk.enqueue(mail(attachments=[Attachment("a", bytes(3_000_001))],
                          save_to_sent_items=False))  # fmt: skip
    with pytest.raises(InvalidMessages, match="expected a list"):
        desk.enqueue(mail(attachments=one))


@SQLITE
def test_without_a_root_no_file_may_be_named(desk: Desk) -> None:
    """The setting is named in the refusal."""
    object.__setattr__(desk.runtime.settings, "attachment_root", None)
    with pytest.raises(InvalidMessages, match="POSTROOM_ATTACHMENT_ROOT"):
        desk.enqueue(mail(attachments=[Attachment("a", path="a")]))


def test_a_row_that_is_left_out_leaves_no_attachment(desk: Desk) -> None:
    """Only what accepted rows refer to goes on its way."""
    good = mail(attachments=[Attachment("a", b"good")])
    bad = mail(to="nobody", attachments=[Attachment("a", b"bad")])
    desk.enqueue(good, bad, on_invalid="skip")
    desk.ingest()
    with desk.runtime.store.engine.connect() as connection:
        found = connection.execute(select(contents.c.sha256)).scalars().all()
    assert found == [hashlib.sha256(b"good").hexdigest()]


@SQLITE
def test_a_full_inbox_takes_the_rest_when_it_is_called_again(desk: Desk) -> None:
    """Attachments count against the budget; a repeat with the key completes the batch."""
    object.__setattr__(desk.runtime.settings, "inbox_budget", 2 * PART)
    content = os.urandom(4 * PART)
    given = mail(attachments=[Attachment("a", content)])
    for _ in range(4):
        try:
            receipt = desk.enqueue(given, idempotency_key="order-1")
            break
        except InboxFull:
            desk.ingest()
    desk.ingest()
    assert receipt.accepted == 1
    sha256 = hashlib.sha256(content).hexdigest()
    assert desk.runtime.store.contents.read(sha256, 0, len(content)) == content


def test_a_message_waits_for_its_attachment(post: Post) -> None:
    """A chunk that is written before the parts it refers to: nothing is sent, no try is spent."""
    receipt = post.enqueue(mail(attachments=[Attachment("a", b"late")]))
    rt = post.runtime
    kept = [part for _, part in rt.parts._read("another worker that is slow")]
    post.ingest()
    post.deliver()
    waiting = post.message(receipt.batch_id)
    assert waiting["state"] == State.QUEUED
    assert waiting["error_code"] == "ContentMissing"
    assert waiting["tries"] == 0
    assert post.simulator.ledger() == []

    rt.store.contents.arrive(kept)
    assert rt.store.contents.missing({kept[0].sha256}) == set()


@SQLITE
def test_memory_stays_flat_while_a_large_file_is_enqueued(desk: Desk, root: Path) -> None:
    """60 MB by path, and 40 messages with 1 MB each: all of it is 100 MB."""
    with (root / "large").open("wb") as file:
        for _ in range(60):
            file.write(os.urandom(1024 * 1024))

    def many() -> Iterator[Message]:
        yield mail(attachments=[Attachment("a", path="large")])
        for n in range(40):
            yield mail(to=f"p{n}@example.org", attachments=[Attachment("a", os.urandom(1 << 20))])

    tracemalloc.start()
    desk.client.enqueue(many(), sender="notices@contoso.com")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


def test_any_range_of_a_content_can_be_read(desk: Desk) -> None:
    """What an upload session asks for next need not be where a part begins."""
    content = os.urandom(3 * PART + 7)
    desk.enqueue(mail(attachments=[Attachment("a", content)]))
    desk.ingest()
    sha256 = hashlib.sha256(content).hexdigest()
    for start in (0, 1, PART - 1, PART, PART + 1, 3 * PART - 2, 5 * PART):
        for length in (1, PART, 3 * PART, 10 * PART):
            found = desk.runtime.store.contents.read(sha256, start, length)
            assert found == content[start : start + length]
