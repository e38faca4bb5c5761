"""`enqueue(session=...)`: the messages are rows of the application's own transaction."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.store_kit import Kit, opened, postgresql_only, sqlite_only
from worker.client import Client
from worker.config import Settings
from worker.model import (
    Attachment,
    IdempotencyConflict,
    InvalidMessages,
    Message,
    Receipt,
    State,
    Unavailable,
    message_id_of,
)
from worker.runtime import Runtime
from worker.store import upgrade

SENDER = "notices@contoso.com"
KEY = "order 17"
NO_REDIS = "redis://127.0.0.1:1/0"


@pytest.fixture
def client(migrated_url: str) -> Iterator[Client]:
    """A client to whom Redis never answers."""
    runtime = Runtime(Settings(redis_url=NO_REDIS, database_url=migrated_url))
    yield Client(lambda: runtime)
    runtime.close()


@pytest.fixture
def theirs(migrated_url: str) -> Iterator[Engine]:
    """The application's own engine, with a table of its own."""
    engine = create_engine(migrated_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (id INTEGER PRIMARY KEY)"))
    yield engine
    engine.dispose()


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def mails(count: int, word: str = "Hello") -> Iterator[Message]:
    return (Message(f"u{n}@example.com", subject=word, text="x") for n in range(1, count + 1))


@pytest.mark.parametrize("kind", ["session", "scoped", "connection"])
def test_what_is_committed_with_the_order_is_sent_and_what_is_rolled_back_is_not(
    client: Client, theirs: Engine, kit: Kit, kind: str
) -> None:
    """Order and notification share one fate, without Redis; a lane finds them after the commit."""
    make: Any = {
        "session": lambda: Session(theirs), "connection": theirs.connect,
        "scoped": scoped_session(sessionmaker(theirs)),
    }[kind]  # fmt: skip
    session = make()
    session.execute(text("INSERT INTO orders VALUES (1)"))
    undone = client.enqueue(mails(250), sender=SENDER, session=session)
    assert (undone.accepted, undone.duplicates) == (250, 0)
    session.rollback()
    assert kit.store.batch_status(undone.batch_id) is None

    session.execute(text("INSERT INTO orders VALUES (1)"))
    done = client.enqueue(mails(450), sender=SENDER, name="May", session=session)
    assert kit.look() is None, "nothing is seen before the commit"
    session.commit()
    session.close()

    status = kit.status(done.batch_id)
    assert (status["state"], status["name"], status["counts"]["queued"]) == ("running", "May", 450)
    assert kit.store.due_targets() == [("mailbox", SENDER)]
    first = message_id_of(done.batch_id, 1)
    assert kit.look().due[0].id == first
    assert kit.claim([first]) == {first: 1}


def test_a_repeat_with_the_key_doubles_nothing_and_other_content_is_refused(
    client: Client, theirs: Engine, kit: Kit
) -> None:
    """In the same transaction and in later ones; a refusal leaves nothing to roll back."""
    with Session(theirs) as session:
        first = client.enqueue(mails(250), sender=SENDER, idempotency_key=KEY, session=session)
        again = client.enqueue(mails(250), sender=SENDER, idempotency_key=KEY, session=session)
        session.commit()
        later = client.enqueue(mails(250), sender=SENDER, idempotency_key=KEY, session=session)
        with pytest.raises(IdempotencyConflict):
            client.enqueue(mails(250, "Bye"), sender=SENDER, idempotency_key=KEY, session=session)
        session.execute(text("INSERT INTO orders VALUES (2)"))
        session.commit()

    assert again == later == Receipt(first.batch_id, 0, 250)
    assert kit.status(first.batch_id)["counts"]["queued"] == 250
    assert kit.sql("SELECT count(*) FROM events")[0][0] == 0
    assert kit.sql("SELECT count(*) FROM orders")[0][0] == 1


@postgresql_only
def test_two_transactions_with_one_key_make_one_batch(
    client: Client, theirs: Engine, kit: Kit
) -> None:
    """The second waits for the first, and finds all of it."""
    start = threading.Barrier(4)

    def call(_: int) -> Receipt:
        with Session(theirs) as session:
            start.wait(20)
            receipt = client.enqueue(mails(450), sender=SENDER, idempotency_key=KEY,
                                     session=session)  # fmt: skip
            session.commit()
            return receipt

    with ThreadPoolExecutor(4) as threads:
        receipts = list(threads.map(call, range(4)))

    assert sorted(r.accepted for r in receipts) == [0, 0, 0, 450]
    assert kit.status(receipts[0].batch_id)["counts"]["queued"] == 450


def test_pools_attachments_and_refusals_work_as_ever(
    client: Client, theirs: Engine, kit: Kit
) -> None:
    """The same door; what an attachment holds is in the transaction too."""
    kit.store.mailboxes.set_pool("news", [SENDER])
    logo = Attachment("logo.png", b"\x89PNG" * 1000, "image/png")
    mail = Message("a@example.com", subject="s", text="x", attachments=[logo])
    with Session(theirs) as session:
        with pytest.raises(InvalidMessages):
            client.enqueue([mail, Message("bob", subject="s", text="x")], pool="news",
                           session=session)  # fmt: skip
        with pytest.raises(InvalidMessages, match="POOL_UNKNOWN"):
            client.enqueue([mail], pool="absent", session=session)
        batch = client.enqueue([mail], pool="news", session=session).batch_id
        session.commit()

    seen = kit.look(pools={"news": [SENDER]})
    [attached] = seen.due[0].content["attachments"]
    assert kit.store.contents.whole(attached["sha256"], 4000) == b"\x89PNG" * 1000
    assert kit.status(batch)["counts"]["queued"] == 1


@postgresql_only
def test_the_tables_are_found_in_their_schema_and_the_application_s_in_its_own(
    database_url: str,
) -> None:
    """Its connection's own way to its tables is not changed by ours."""
    upgrade(database_url, "postroom")
    runtime = Runtime(Settings(redis_url=NO_REDIS, database_url=database_url,
                               db_schema="postroom"))  # fmt: skip
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE batches (id INTEGER)"))
        batch = Client(lambda: runtime).enqueue(mails(3), sender=SENDER, session=connection)
        connection.execute(text("INSERT INTO batches VALUES (1)"))
        assert "schema_translate_map" not in connection.get_execution_options()

    found = runtime.store.batch_status(batch.batch_id)
    assert found is not None
    assert found["counts"][State.QUEUED] == 3
    runtime.close()
    engine.dispose()


@sqlite_only
@pytest.mark.parametrize("session", ["engine", object()])
def test_what_is_no_session_is_refused_by_name(client: Client, session: object) -> None:
    """One clear line."""
    with pytest.raises(InvalidMessages, match="session: expected a Session or a Connection"):
        client.enqueue(mails(1), sender=SENDER, session=session)


@postgresql_only
def test_a_database_that_breaks_is_unavailable_and_names_the_batch(
    client: Client, theirs: Engine, kit: Kit
) -> None:
    """Whoever repeats the whole transaction gives the same key."""
    with Session(theirs) as session:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()

        @event.listens_for(theirs, "before_cursor_execute")
        def _strike(_c: Any, _u: Any, statement: str, *_: Any) -> None:
            if "INSERT INTO messages" in statement:
                kit.sql("SELECT pg_terminate_backend(:pid, 10000)", pid=pid)

        with pytest.raises(Unavailable) as caught:
            client.enqueue(mails(3), sender=SENDER, idempotency_key=KEY, session=session)
        session.rollback()

    assert caught.value.batch_id
    with pytest.raises(Unavailable, match="Redis"):
        client.status(caught.value.batch_id)
