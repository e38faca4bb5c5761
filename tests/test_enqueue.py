"""`Client.enqueue`: all or nothing at the door, each message once in the inbox."""

from __future__ import annotations

import json
import logging
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.client import Client
from worker.config import Settings
from worker.csvfile import CsvFile
from worker.ingest import ingest
from worker.model import (
    Attachment,
    IdempotencyConflict,
    InboxFull,
    InvalidMessages,
    Message,
    NotFound,
    Problem,
    Receipt,
    Template,
    Unavailable,
)
from worker.runtime import Runtime
from worker.servers import RedisServer

SENDER = "notices@contoso.com"
KEY = "order 17"
TO_FILL = [{"to": "a@example.com"}]

Make = Callable[..., Runtime]


@pytest.fixture
def make() -> Iterator[Make]:
    """Runtimes, closed at the end."""
    made: list[Runtime] = []

    def runtime(**given: Any) -> Runtime:
        made.append(Runtime(Settings(**given)))
        return made[-1]

    yield runtime
    for one in made:
        one.redis.close()
        one.close()


@pytest.fixture
def rt(make: Make, redis_url: str) -> Runtime:
    return make(redis_url=redis_url, pools={"staff": [SENDER]})


@pytest.fixture
def whole(make: Make, redis_url: str, migrated_url: str) -> Runtime:
    """With a database."""
    return make(redis_url=redis_url, database_url=migrated_url)


def client_of(rt: Runtime) -> Client:
    return Client(lambda: rt)


def mails(count: int, word: str = "Hello") -> Iterator[Message]:
    return (Message(to=f"u{n}@example.com", subject=word, text="x") for n in range(1, count + 1))


def rows(rt: Runtime) -> list[Any]:
    """All that lies in the inbox, in order."""
    raw: Any = rt.redis.xrange("postroom:inbox")
    return [row for _, fields in raw for row in json.loads(fields[b"body"])]


def take_in(rt: Runtime) -> None:
    ingest(rt.inbox, rt.store, consumer="test", max_age=timedelta(hours=1), wake=lambda *_: None)


def codes(error: pytest.ExceptionInfo[InvalidMessages]) -> list[tuple[int, str]]:
    return [(p.row, p.code) for p in error.value.problems]


def test_every_message_is_in_the_inbox_once_and_in_order(rt: Runtime):
    """Chunks have at most 200 messages; the batch's head says what makes it whole."""
    receipt = client_of(rt).enqueue(mails(450), sender=SENDER, name="May", priority="high")
    assert receipt == Receipt(receipt.batch_id, 450, 0, ())
    assert [row[0] for row in rows(rt)] == list(range(1, 451))
    assert rows(rt)[0][1:] == [1, "u1@example.com", {
        "to": [{"address": "u1@example.com"}], "subject": "Hello", "text": "x"}]  # fmt: skip
    known = rt.inbox.batch(receipt.batch_id)
    assert known is not None
    assert (known["numbers"], known["messages"]) == ({1: 200, 2: 200, 3: 50}, 450)
    head = known["head"]
    assert (head["target_kind"], head["target"], head["priority"]) == ("mailbox", SENDER, 0)
    assert head["name"] == "May"


def test_large_messages_make_smaller_chunks(rt: Runtime):
    """1 MiB at most, and a single larger message is a chunk of its own."""
    large = [Message(to="a@example.com", subject="s", text="x" * n)
             for n in (700_000, 300_000, 700_000)]  # fmt: skip
    large.append(Message(to="a@example.com", subject="s", html="y" * 900_000, text="x" * 900_000))
    receipt = client_of(rt).enqueue(large, sender=SENDER)
    assert (rt.inbox.batch(receipt.batch_id) or {})["numbers"] == {1: 2, 2: 1, 3: 1}


def test_a_refused_call_names_every_problem_and_leaves_nothing_in_redis(rt: Runtime):
    """Also where the bad row comes after chunks that were already full."""
    bad = [*mails(500), Message(to="bob", subject="s", text="x"), *mails(3),
           Message(to="a@example.com", subject="a\nb")]  # fmt: skip
    with pytest.raises(InvalidMessages) as caught:
        client_of(rt).enqueue(bad, sender=SENDER, idempotency_key=KEY)
    assert codes(caught) == [(501, "ADDR_NO_AT"), (505, "CTRL_CHAR"), (505, "BODY_NONE")]
    assert rt.redis.dbsize() == 0


def test_the_first_thousand_problems_are_kept_and_the_others_counted(rt: Runtime):
    """A million wrong rows must not fill the producer's memory."""
    with pytest.raises(InvalidMessages) as caught:
        client_of(rt).enqueue(({"to": "bob"} for _ in range(2000)), sender=SENDER)
    assert len(caught.value.problems) == 1001
    assert caught.value.problems[-1].detail == "and 5000 more problems"


def test_skip_takes_the_good_rows_and_returns_the_bad_ones(rt: Runtime):
    """The three numbers add up to the rows; positions stay those of the input."""
    mixed: list[Any] = [*mails(2), {"to": "bob"}, 5, Problem(0, "CSV_FIELDS", "line 9", "too few"),
                        *mails(1)]  # fmt: skip
    receipt = client_of(rt).enqueue(mixed, sender=SENDER, on_invalid="skip")
    assert (receipt.accepted, receipt.duplicates) == (3, 0)
    assert [(p.row, p.code) for p in receipt.rejected] == [
        (3, "ADDR_NO_AT"), (4, "TYPE"), (5, "CSV_FIELDS"),
    ]  # fmt: skip
    assert [row[0] for row in rows(rt)] == [1, 2, 6]


def test_skip_with_no_good_row_makes_no_batch(rt: Runtime):
    """However many are refused, each is returned."""
    receipt = client_of(rt).enqueue([{"to": "bob"}] * 1500, sender=SENDER, on_invalid="skip")
    assert (receipt.accepted, len(receipt.rejected)) == (0, 1500)
    assert rt.redis.dbsize() == 0


@pytest.mark.parametrize(
    ("messages", "arguments", "expected"),
    [
        ([], {}, (0, "EMPTY")), ("a@example.com", {}, (0, "TYPE")), (None, {}, (0, "TYPE")),
        (list(mails(1)), {"pool": "staff"}, (0, "TARGET")),
        (list(mails(1)), {"idempotency_key": ""}, (0, "KEY_SYNTAX")),
        (TO_FILL, {"template": Template("s", text="{{ a")}, (0, "TPL_SYNTAX")),
        (TO_FILL, {"template": Template("s")}, (0, "BODY_NONE")),
        (TO_FILL, {"template": "Hello"}, (0, "TYPE")),
        (TO_FILL, {"template": {"subject": 5, "text": "x"}}, (0, "TYPE")),
        (TO_FILL, {"template": {"subject": "s", "body": "x"}}, (0, "FIELD")),
    ],
)  # fmt: skip
def test_a_wrong_call_is_refused_as_row_0(
    rt: Runtime, messages: Any, arguments: dict[str, Any], expected: tuple[int, str]
):
    """And leaves nothing."""
    with pytest.raises(InvalidMessages) as caught:
        client_of(rt).enqueue(messages, sender=SENDER, **arguments)
    assert codes(caught) == [expected]
    assert rt.redis.dbsize() == 0


def test_a_row_that_lacks_a_variable_is_named(rt: Runtime):
    """Row and variable; the batch stores its template once."""
    template = Template("Hello {{ name }}", html="<p>{{ amount }}</p>")
    good = {"to": "a@example.com", "variables": {"name": "Ann", "amount": 5}}
    with pytest.raises(InvalidMessages) as caught:
        client_of(rt).enqueue([good, {**good, "variables": {"name": "Ann"}}], sender=SENDER,
                              template=template)  # fmt: skip
    (problem,) = caught.value.problems
    assert (problem.row, problem.code) == (2, "TPL_VAR_MISSING")
    assert '"amount"' in problem.detail
    receipt = client_of(rt).enqueue([good], sender=SENDER, template=template)
    head = (rt.inbox.batch(receipt.batch_id) or {})["head"]
    assert head["template"] == {"subject": "Hello {{ name }}", "html": "<p>{{ amount }}</p>"}
    assert "Hello" not in json.dumps(rows(rt))


def test_a_single_message_is_a_batch_of_one_and_a_pool_is_a_target(rt: Runtime):
    """The small case needs no ceremony."""
    receipt = client_of(rt).enqueue(next(mails(1)), pool="staff")
    assert receipt.accepted == 1
    assert (rt.inbox.batch(receipt.batch_id) or {})["head"]["target_kind"] == "pool"


def test_the_same_call_with_the_same_key_adds_nothing(whole: Runtime):
    """Before ingest, after it, and after Redis has forgotten everything."""
    client = client_of(whole)
    first = client.enqueue(mails(450), sender=SENDER, idempotency_key=KEY, name="one")
    assert (first.accepted, first.duplicates) == (450, 0)
    for after in (lambda: None, lambda: take_in(whole), whole.redis.flushdb):
        after()
        again = client.enqueue(mails(450), sender=SENDER, idempotency_key=KEY, name="two")
        assert again == Receipt(first.batch_id, 0, 450)
    assert whole.redis.dbsize() == 0
    assert client.status(first.batch_id)["counts"]["queued"] == 450


@pytest.mark.parametrize(
    "change",
    [{"messages": list(mails(3, "Other"))}, {"messages": list(mails(2))},
     {"sender": "b@contoso.com"}, {"priority": "bulk"}, {"template": Template("s", text="x")}],
    ids=["content", "count", "sender", "priority", "template"],
)  # fmt: skip
@pytest.mark.parametrize("forgotten", [False, True], ids=["redis", "sql"])
@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_the_same_key_with_other_content_is_refused(
    whole: Runtime, change: dict[str, Any], forgotten: bool
):
    """By Redis while it remembers, and by SQL afterwards; the first content stands."""
    client = client_of(whole)
    messages = [Message(to="a@example.com", subject="s")] * 3 if "template" in change else None
    call: dict[str, Any] = {"messages": messages or list(mails(3)), "sender": SENDER,
                            "idempotency_key": KEY}  # fmt: skip
    if messages:
        call["template"] = Template("s", text="other")
    first = client.enqueue(**call)
    take_in(whole)
    if forgotten:
        whole.redis.flushdb()
    with pytest.raises(IdempotencyConflict) as caught:
        client.enqueue(**{**call, **change})
    assert caught.value.batch_id == first.batch_id
    assert whole.inbox.waiting() == 0


def test_only_what_sql_lacks_is_appended_again(whole: Runtime):
    """Redis was emptied in the middle: the repeat completes the batch and doubles nothing."""
    client = client_of(whole)
    first = client.enqueue(mails(450), sender=SENDER, idempotency_key=KEY)
    head = whole.inbox.batch(first.batch_id)
    entries = whole.inbox.read("test", 10, 60_000)
    whole.inbox.done(entries[1:])
    assert head is not None
    whole.redis.xgroup_destroy("postroom:inbox", "postroom")
    take_in(whole)
    whole.redis.flushdb()
    again = client.enqueue(mails(450), sender=SENDER, idempotency_key=KEY)
    assert (again.accepted, again.duplicates) == (250, 200)
    take_in(whole)
    status = client.status(first.batch_id)
    assert (status["counts"]["queued"], status["state"]) == (450, "running")


def test_a_full_inbox_is_said_and_the_repeat_completes_the_batch(make: Make, redis_url: str,
                                                                 migrated_url: str):  # fmt: skip
    """What was kept stays; the batch id of the error is the key to go on with."""
    small = make(redis_url=redis_url, database_url=migrated_url, inbox_budget=25_000)
    with pytest.raises(InboxFull) as caught:
        client_of(small).enqueue(mails(450), sender=SENDER)
    batch_id = caught.value.batch_id
    assert 0 < small.inbox.waiting() < 3
    take_in(small)
    assert client_of(small).status(batch_id)["state"] == "open"
    kept = client_of(small).status(batch_id)["counts"]["queued"]
    again = client_of(make(redis_url=redis_url, database_url=migrated_url)).enqueue(
        mails(450), sender=SENDER, idempotency_key=batch_id
    )
    assert (again.batch_id, again.accepted + again.duplicates) == (batch_id, 450)
    assert again.duplicates == kept
    take_in(small)
    status = client_of(small).status(batch_id)
    assert (status["state"], status["counts"]["queued"]) == ("running", 450)


def test_a_redis_that_is_gone_is_said_within_two_seconds(make: Make, own_redis: RedisServer):
    """With the batch id that belongs to the key."""
    rt = make(redis_url=own_redis.url)
    client = client_of(rt)
    done = client.enqueue(mails(1), sender=SENDER)
    own_redis.stop()
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        client.enqueue(mails(1), sender=SENDER, idempotency_key=done.batch_id)
    assert time.monotonic() - started < 2
    assert caught.value.batch_id == done.batch_id


def test_a_redis_that_hangs_is_said_within_two_seconds(make: Make, own_redis: RedisServer):
    """Connected and silent: the timeout must not add up over several questions."""
    rt = make(redis_url=own_redis.url)
    client_of(rt).enqueue(mails(1), sender=SENDER)
    with redis.Redis.from_url(own_redis.url) as connection:
        connection.client_pause(60_000)
    started = time.monotonic()
    with pytest.raises(Unavailable):
        client_of(rt).enqueue(mails(1), sender=SENDER)
    assert time.monotonic() - started < 2


def test_a_database_that_is_gone_is_said_when_it_is_needed(make: Make, redis_url: str,
                                                           tmp_path: Path):  # fmt: skip
    """Without a key SQL is not touched at all."""
    rt = make(redis_url=redis_url, database_url=f"sqlite:///{tmp_path}/absent/x.db")
    assert client_of(rt).enqueue(mails(1), sender=SENDER).accepted == 1
    with pytest.raises(Unavailable) as caught:
        client_of(rt).enqueue(mails(1), sender=SENDER, idempotency_key=KEY)
    assert caught.value.batch_id
    with pytest.raises(Unavailable):
        client_of(rt).enqueue(mails(1), pool="staff")


def test_a_bell_that_fails_never_fails_the_call(
    make: Make, own_redis: RedisServer, caplog: pytest.LogCaptureFixture
):
    """A user who may write to the inbox and not to Celery's queue: the sweep looks anyway."""
    with redis.Redis.from_url(own_redis.url) as connection:
        connection.execute_command("ACL", "SETUSER", "default", "resetkeys", "~postroom:inbox*",
                                   "~postroom:batch:*")  # fmt: skip
    rt = make(redis_url=own_redis.url)
    with caplog.at_level(logging.WARNING):
        assert client_of(rt).enqueue(mails(1), sender=SENDER).accepted == 1
    assert "bell" in caplog.text


def test_an_error_of_the_caller_s_own_passes_and_leaves_nothing(rt: Runtime):
    """The messages may come from a generator that fails."""

    def failing() -> Iterator[Message]:
        yield from mails(300)
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        client_of(rt).enqueue(failing(), sender=SENDER)
    assert rt.redis.dbsize() == 0


def test_two_threads_with_one_key_make_one_batch(whole: Runtime):
    """Whoever comes second finds what the first has done, chunk by chunk."""
    receipts: list[Receipt] = []

    def call() -> None:
        receipts.append(client_of(whole).enqueue(mails(1000), sender=SENDER, idempotency_key=KEY))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({r.batch_id for r in receipts}) == 1
    assert sum(r.accepted for r in receipts) == 1000
    assert sum(r.duplicates for r in receipts) == 3000
    assert [row[0] for row in rows(whole)] == sorted({row[0] for row in rows(whole)})


def test_a_batch_is_known_from_the_moment_the_call_returned(whole: Runtime):
    """What still lies in the inbox counts as queued; then SQL says the same."""
    client = client_of(whole)
    receipt = client.enqueue(mails(3), sender=SENDER, name="May")
    before = client.status(receipt.batch_id)
    assert (before["counts"]["queued"], before["total"], before["name"]) == (3, 3, "May")
    take_in(whole)
    after = client.status(receipt.batch_id)
    assert after["counts"] == before["counts"]
    assert after.keys() == before.keys()
    assert [m["to"] for m in client.messages(receipt.batch_id)] == [
        "u1@example.com", "u2@example.com", "u3@example.com",
    ]  # fmt: skip
    assert client.retry(receipt.batch_id) == {"requeued": 0, "left": {"queued": 3}}
    for unknown in ("nonsense", "6f0b1f0e-5b0c-5a54-9d0e-0a3d2f1c7b66"):
        for ask in (client.status, client.messages, client.retry):
            with pytest.raises(NotFound):
                ask(unknown)


def test_preview_shows_the_first_rows_and_sends_nothing(rt: Runtime):
    """As they would be sent."""
    template = Template("Hello {{ name }}", text="{{ name }}!")
    people = ({"to": "a@example.com", "variables": {"name": n}} for n in ("Ann", "Bob", "C", "D"))
    shown = client_of(rt).preview(people, template=template, count=2)
    assert [(s.subject, s.text) for s in shown] == [("Hello Ann", "Ann!"), ("Hello Bob", "Bob!")]
    with pytest.raises(InvalidMessages):
        client_of(rt).preview([{"to": "bob"}], template=template)
    assert rt.redis.dbsize() == 0


def test_a_csv_goes_in_with_its_bad_rows_named(rt: Runtime, tmp_path: Path):
    """The reader's problems and the door's are one list."""
    path = tmp_path / "people.csv"
    path.write_text("To;Name\na@example.com;Ann\nb@example.com\nbob;Bob\n")
    template = Template("Hello {{ name }}", text="x")
    with pytest.raises(InvalidMessages) as caught:
        client_of(rt).enqueue(CsvFile(path, wanted={"name"}), sender=SENDER, template=template)
    assert codes(caught) == [(2, "CSV_FIELDS"), (3, "ADDR_NO_AT")]


def test_memory_stays_flat_however_many_messages(rt: Runtime):
    """The messages are read once, and laid aside on disk above a few megabytes."""
    many = (Message(to="a@example.com", subject="s", text=f"{n}" * 50_000) for n in range(10, 810))
    tracemalloc.start()
    client_of(rt).enqueue(many, sender=SENDER)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25_000_000, "all of it is 119 MB"


# ---- fuzz ---------------------------------------------------------------------------------------

ODD = st.text(st.characters(), max_size=20)  # lone surrogates and control characters too
ADDRESS = st.sampled_from(["a@example.com", "b@bücher.example", "bob", ""]) | ODD
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD | st.binary(max_size=3),
    lambda of: st.lists(of, max_size=3) | st.tuples(of, of) | st.dictionaries(ODD, of, max_size=3),
    max_leaves=6,
)
ANY = VALUES | st.just(Attachment("a", b"b")) | st.just(object())
ATTACHED = st.builds(
    Attachment, ODD | ANY, content=st.binary(max_size=3) | ANY, content_type=ODD | st.none(),
    content_id=ODD | st.none(), path=ODD | st.none() | ANY,
)  # fmt: skip
MESSAGES = st.builds(
    Message, to=ADDRESS | st.lists(ADDRESS, max_size=3) | ANY, subject=ODD | ANY, html=ODD | ANY,
    text=ODD | ANY, cc=ANY, bcc=ANY, reply_to=ANY, from_=ADDRESS | ANY,
    attachments=st.lists(ATTACHED, max_size=2) | ANY,
    variables=st.dictionaries(ODD, VALUES, max_size=3) | ANY, list_unsubscribe=ODD | ANY,
    headers=st.dictionaries(st.sampled_from(["x-a", "X-B"]) | ODD, ODD) | ANY,
    importance=st.sampled_from(["low", "high"]) | ANY, save_to_sent_items=ANY, reference=ANY,
)  # fmt: skip
PLAIN = st.builds(Message, to=st.just("a@example.com"), subject=ODD, text=ODD,
                  variables=st.dictionaries(ODD, VALUES, max_size=3))  # fmt: skip


@given(st.lists(MESSAGES | PLAIN | ANY, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_message_raises_anything_else_and_a_refused_one_leaves_nothing(
    rt: Runtime, messages: list[Any]
):
    """Whatever is given: a receipt whose rows are in the inbox, or InvalidMessages and no key."""
    rt.redis.flushdb()
    try:
        receipt = client_of(rt).enqueue(messages, sender=SENDER)
    except InvalidMessages as error:
        str(error).encode()  # it can be printed
        assert rt.redis.dbsize() == 0
    else:
        assert [row[0] for row in rows(rt)] == list(range(1, receipt.accepted + 1))


@given(st.dictionaries(
    st.sampled_from(["sender", "pool", "name", "template", "priority", "send_at", "expires_at",
                     "idempotency_key", "on_invalid", "on_finished"]), ANY))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_argument_raises_anything_else(rt: Runtime, arguments: dict[str, Any]):
    """The same for the call's own arguments; a pool asks SQL, which this runtime does not have."""
    arguments.setdefault("sender", SENDER)
    if "pool" in arguments:
        arguments["pool"] = "staff"
    arguments.pop("idempotency_key", None)
    rt.redis.flushdb()
    try:
        client_of(rt).enqueue(list(mails(1)), **arguments)
    except InvalidMessages:
        assert rt.redis.dbsize() == 0
