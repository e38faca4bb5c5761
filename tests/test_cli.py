"""The command line as people and programs meet it: documents, exit statuses, one-line errors."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from sqlalchemy import Engine, insert, select, update

from tests.support import Processes, clean_environment, wait_until
from worker.inbox import Inbox
from worker.ingest import ingest
from worker.model import State
from worker.servers import RedisServer
from worker.store import Store, make_engine
from worker.store.schema import attempts, events, mailboxes, messages

POSTROOM = str(Path(sys.executable).with_name("postroom"))
SENDER = "notices@contoso.com"
POOLS = {"five": ["a@contoso.com", "b@contoso.com"]}
HEADER = "to,name\n"

Command = Callable[..., subprocess.CompletedProcess[str]]


def call(*words: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command with these settings and no others."""
    return subprocess.run(
        [POSTROOM, *(str(word) for word in words)],
        env=clean_environment() | {f"POSTROOM_{name}": value for name, value in settings.items()},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def postroom(redis_url: str, migrated_url: str) -> Command:
    """The command, with a Redis and a migrated database."""
    settings = {"REDIS_URL": redis_url, "DATABASE_URL": migrated_url, "POOLS": json.dumps(POOLS)}

    def run(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
        return call(*words, **(settings | more))

    return run


@pytest.fixture
def engine(migrated_url: str) -> Any:
    made = make_engine(migrated_url)
    yield made
    made.dispose()


@pytest.fixture
def html(tmp_path: Path) -> Path:
    path = tmp_path / "body.html"
    path.write_text("<p>Dear {{ name }}</p>")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A CSV with three rows."""
    return write(tmp_path, HEADER + "".join(f"p{n}@fabrikam.com,Name {n}\n" for n in range(1, 4)))


def write(directory: Path, content: str | bytes) -> Path:
    path = directory / "rows.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document of a command that succeeded."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stderr.startswith("postroom: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.strip()


def send_three(postroom: Command, rows: Path, html: Path, *more: object) -> Any:
    words = ("send", rows, "--sender", SENDER, "--subject", "Hello {{ name }}", "--html", html)
    return document(postroom(*words, "--json", *more))


def arrive(redis_url: str, engine: Engine) -> None:
    """What a worker does: the inbox becomes rows."""
    with redis.Redis.from_url(redis_url) as client:
        ingest(Inbox(client), Store(engine), consumer="test", max_age=timedelta(hours=24),
               wake=lambda targets: None)  # fmt: skip


def move(engine: Engine, batch_id: str, position: int, state: State, **more: Any) -> None:
    """Put one message into a state, as a worker would have."""
    with engine.begin() as connection:
        done = connection.execute(
            update(messages)
            .where(messages.c.batch_id == batch_id, messages.c.position == position)
            .values(state=state, mailbox=SENDER, **more)
        )
        assert done.rowcount == 1


def finish(engine: Engine) -> None:
    """What a lane and a sweep do at the end: one finds the queue empty, the other the batch."""
    store = Store(engine)
    assert store.look(SENDER, {}, {}, 10) is None
    assert len(store.finish_batches()) == 1


@pytest.fixture
def ended(
    postroom: Command, rows: Path, html: Path, redis_url: str, engine: Engine
) -> str:  # fmt: skip
    """A batch of three that has ended: one sent, one failed, one unknown."""
    batch_id: str = send_three(postroom, rows, html)["batch_id"]
    arrive(redis_url, engine)
    move(engine, batch_id, 1, State.SENT, sent_at=datetime.now(UTC), request_id="r-1")
    move(engine, batch_id, 2, State.FAILED, error_code="ErrorInvalidRecipients")
    move(engine, batch_id, 3, State.UNKNOWN, doubt=True)
    finish(engine)
    return batch_id


# ---- starting --------------------------------------------------------------------------------


def test_help_needs_no_library_that_is_slow_to_import():
    """Whoever asks how to use it is answered at once."""
    script = "import sys; import worker.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()

    assert not {"celery", "sqlalchemy", "msal", "redis", "pydantic", "alembic"} & set(loaded)


def test_help_names_every_command():
    """`postroom --help` is the table of contents."""
    shown = call("--help").stdout

    for command in ("demo", "db", "send", "batch", "message", "simulator"):
        assert f"  {command} " in shown


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["send"],
        ["send", "x.csv", "--subject", "x", "--html", "y"],
        ["send", "x.csv", "--subject", "x", "--sender", SENDER],
        ["send", "x.csv", "--subject", "x", "--html", "y", "--sender", SENDER, "--pool", "p"],
        ["send", "x.csv", "--subject", "x", "--html", "y", "--sender", SENDER, "--priority", "z"],
        ["batch", "export", str(uuid4()), "--format", "xml"],
        ["batch", "retry", str(uuid4()), "--since", "yesterday"],
        ["batch", "retry", str(uuid4()), "--since", "2026-10-25T09:00"],
        ["demo", "0"],
        ["simulator", "--json", "--nonsense=1"],
    ],
)
def test_wrong_usage_is_exit_status_2(words: list[str]):
    """Wrong usage is told apart from a failure, and prints nothing that looks like a result."""
    done = call(*words)

    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


# ---- the servers -----------------------------------------------------------------------------


def test_a_wrong_setting_is_named(tmp_path: Path):
    """The person reads which variable is wrong and what it may be."""
    assert "POSTROOM_LEASE: give a duration" in said(call("batch", "list", LEASE="soon"))


def test_an_absent_database_url_is_named():
    """Nothing is guessed about where the database lies."""
    assert "POSTROOM_DATABASE_URL is not set" in said(call("batch", "list"))


def test_a_database_that_is_not_migrated_says_what_to_run(database_url: str):
    """Not a table that is missing, but the command that makes it."""
    for words in (["batch", "list"], ["batch", "status", uuid4()], ["message", "show", uuid4()]):
        line = said(call(*words, DATABASE_URL=database_url))

        assert line == "postroom: the database is not migrated; run: postroom db upgrade"


def test_upgrade_makes_the_tables_and_may_be_repeated(database_url: str):
    """One command makes an empty database ready, and does no harm to a ready one."""
    first = document(call("db", "upgrade", "--json", DATABASE_URL=database_url))
    again = document(call("db", "upgrade", "--json", DATABASE_URL=database_url))

    assert first == again == {"revision": "0004"}
    assert document(call("batch", "list", "--json", DATABASE_URL=database_url)) == []


def test_a_database_of_another_revision_is_told(migrated_url: str, engine: Engine):
    """Old tables are not worked with."""
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE postroom_version SET version_num = '0000'")

    line = said(call("batch", "list", DATABASE_URL=migrated_url))

    assert "is at revision 0000, not 0004; run: postroom db upgrade" in line


@pytest.mark.parametrize(
    "url",
    ["sqlite:////nowhere/at/all.db", "postgresql+psycopg://user:secret@127.0.0.1:1/none"],
)
def test_a_database_that_does_not_answer_is_one_line_without_the_password(url: str):
    """The line may go into a ticket."""
    for words in (["batch", "list"], ["db", "upgrade"]):
        line = said(call(*words, DATABASE_URL=url))

        assert "the database does not answer" in line
        assert "secret" not in line


def test_a_redis_that_is_down_is_one_line(migrated_url: str, rows: Path, html: Path):
    """`send` keeps nothing that nobody could read, and says so."""
    settings = {"REDIS_URL": "redis://user:secret@127.0.0.1:1/0", "DATABASE_URL": migrated_url}
    words = ("send", rows, "--sender", SENDER, "--subject", "x", "--html", html)

    for command in (words, (*words, "--dry-run"), ("batch", "status", uuid4())):
        line = said(call(*command, **settings))

        assert "Redis does not answer (ConnectionError)" in line
        assert "secret" not in line


def test_a_redis_that_hangs_is_given_up_within_two_seconds(
    migrated_url: str, rows: Path, html: Path, own_redis: RedisServer, processes: Processes
):
    """A stalled server is no stalled terminal: the wait for Redis itself is bounded."""
    os.kill(own_redis.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        line = said(call("send", rows, "--sender", SENDER, "--subject", "x", "--html", html,
                         REDIS_URL=own_redis.url, DATABASE_URL=migrated_url))  # fmt: skip
        took = time.monotonic() - began
    finally:
        os.kill(own_redis.pid, signal.SIGCONT)

    assert "Redis does not answer (TimeoutError)" in line
    assert took < 10  # 1.5 s of waiting, and a start on a busy machine


def test_an_ended_batch_is_told_without_redis(ended: str, postroom: Command):
    """What SQL knows whole needs no Redis: only whether workers run is not known."""
    done = postroom("batch", "status", ended, "--json", REDIS_URL="redis://127.0.0.1:1/0")

    assert document(done)["counts"]["sent"] == 1
    assert document(done)["workers"] is None
    assert "whether a worker runs is not known" in done.stderr


# ---- send ------------------------------------------------------------------------------------


def test_a_batch_is_known_from_the_moment_send_returned(
    postroom: Command, rows: Path, html: Path, redis_url: str, engine: Engine
):
    """No moment between the inbox and SQL at which an accepted message is counted nowhere."""
    sent = send_three(postroom, rows, html, "--name", "June")
    in_inbox = document(postroom("batch", "status", sent["batch_id"], "--json"))
    arrive(redis_url, engine)
    in_sql = document(postroom("batch", "status", sent["batch_id"], "--json"))

    assert sent == {"batch_id": sent["batch_id"], "accepted": 3, "duplicates": 0, "rejected": [],
                    "workers": 0}  # fmt: skip
    for status in (in_inbox, in_sql):
        assert status["total"] == 3
        assert status["name"] == "June"
        assert status["counts"] == {str(state): 3 * (state is State.QUEUED) for state in State}
        assert status["blocked"] == []
        assert status["eta"] is None
    assert (in_inbox["state"], in_sql["state"]) == ("open", "running")


def test_the_same_key_makes_no_second_batch(postroom: Command, rows: Path, html: Path):
    """A cron job that runs twice sends once."""
    first = send_three(postroom, rows, html, "--idempotency-key", "june")
    again = send_three(postroom, rows, html, "--idempotency-key", "june")

    assert again["batch_id"] == first["batch_id"]
    assert (again["accepted"], again["duplicates"]) == (0, 3)


def test_the_same_key_with_other_content_is_refused(postroom: Command, rows: Path, html: Path):
    """What was accepted stands."""
    send_three(postroom, rows, html, "--idempotency-key", "june")
    html.write_text("<p>Other</p>")

    line = said(postroom("send", rows, "--sender", SENDER, "--subject", "Hello {{ name }}",
                         "--html", html, "--idempotency-key", "june"))  # fmt: skip

    assert "was used with other content" in line


def test_send_and_status_say_that_no_worker_runs(
    postroom: Command, rows: Path, html: Path, redis_client: redis.Redis
):
    """Waiting in vain is noticed at once; with a worker nothing is said."""
    words = ("send", rows, "--pool", "five", "--subject", "x", "--html", html)
    alone = postroom(*words)
    redis_client.set("postroom:worker:host:1:abc", "1", ex=60)
    attended = postroom(*words)

    assert "no worker is running" in alone.stderr
    assert "3 accepted" in alone.stdout
    assert attended.stderr == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"email,name\na@b.com,A\n", "no column `to`; it has 'email', 'name' (CSV_COLUMNS)"),
        (b"", "is empty"),
        (b"to,name\n", "has a header and no rows"),
        (b"to,name\na@fabrikam.com\n", "line 2: too few fields: 1, the header has 2"),
        (b"to,name\na@fabrikam.com,M\xfcller\n", "is not utf-8; name the encoding"),
        (b"to,name\n\na@fabrikam.com,A\nnobody,B\n", "line 4: to: "),
    ],
)
def test_a_bad_csv_is_told_with_line_and_reason(
    content: bytes, reason: str, postroom: Command, html: Path, tmp_path: Path,
    redis_client: redis.Redis,
):  # fmt: skip
    """One line says what is wrong and where; the document lists every problem; nothing is kept."""
    path = write(tmp_path, content)
    words = ("send", path, "--sender", SENDER, "--subject", "x", "--html", html)

    for more in ([], ["--dry-run"]):
        done = postroom(*words, *more, "--json")

        assert reason in said(done)
        assert str(path) in said(done)
        assert json.loads(done.stdout)["error"] in done.stderr
        assert json.loads(done.stdout)["problems"]
        assert redis_client.xlen("postroom:inbox") == 0


def test_all_bad_rows_are_shown_as_a_table(postroom: Command, html: Path, tmp_path: Path):
    """A person mends all rows in one go."""
    path = write(tmp_path, HEADER + "a@fabrikam.com,A\nnobody,B\nc@fabrikam.com\n")

    done = postroom("send", path, "--sender", SENDER, "--subject", "x", "--html", html)

    assert "2 rows" in said(done)
    shown = [line.split()[:2] for line in done.stdout.splitlines()]
    assert shown == [["ROW", "LINE"], ["2", "3"], ["3", "4"]]


def test_bad_rows_are_left_out_where_asked(postroom: Command, html: Path, tmp_path: Path):
    """The good rows go; accepted, duplicates and rejected add up to the rows."""
    path = write(tmp_path, HEADER + "a@fabrikam.com,A\nnobody,B\nc@fabrikam.com\n")
    words = ("send", path, "--sender", SENDER, "--subject", "x", "--html", html, "--skip-invalid")

    sent = document(postroom(*words, "--json"))

    assert (sent["accepted"], sent["duplicates"]) == (1, 0)
    assert [one["row"] for one in sent["rejected"]] == [2, 3]
    assert all(set(one) == {"row", "code", "detail"} for one in sent["rejected"])


def test_nothing_but_bad_rows_is_a_failure(postroom: Command, html: Path, tmp_path: Path):
    """There is no batch that could be asked for, so no success is claimed."""
    path = write(tmp_path, HEADER + "nobody,B\n")

    line = said(postroom("send", path, "--sender", SENDER, "--subject", "x", "--html", html,
                         "--skip-invalid"))  # fmt: skip

    assert "nothing was sent: 1 rows" in line
    done = postroom("send", path, "--sender", SENDER, "--subject", "x", "--html", html,
                    "--skip-invalid", "--json")  # fmt: skip
    told = json.loads(done.stdout)
    assert (done.returncode, told["accepted"], told["duplicates"]) == (1, 0, 0)
    assert [one["row"] for one in told["rejected"]] == [1]


def test_rejected_rows_have_a_place_before_anything_is_sent(
    postroom: Command, rows: Path, html: Path, tmp_path: Path, redis_client: redis.Redis
):
    """A batch that was accepted must not end in a failure that makes people send it again."""
    words = ("send", rows, "--sender", SENDER, "--subject", "x", "--html", html, "--skip-invalid")

    line = said(postroom(*words, "--rejected", tmp_path / "nowhere" / "bad.csv"))
    alone = postroom("send", "--to", "a@fabrikam.com", "--sender", SENDER, "--subject", "x",
                     "--html", html, "--rejected", tmp_path / "bad.csv")  # fmt: skip

    assert "--rejected" in line
    assert "cannot be written: No such file or directory" in line
    assert alone.returncode == 2
    assert not redis_client.keys("postroom:*")


def test_a_dry_run_shows_the_first_rows_and_sends_nothing(
    postroom: Command, rows: Path, html: Path, redis_client: redis.Redis
):
    """What will be read is seen before it is sent."""
    words = ("send", rows, "--sender", SENDER, "--subject", "Hello {{ name }}", "--html", html)

    shown = document(postroom(*words, "--dry-run", "--json"))

    assert shown["rows"] == 3
    assert shown["first"][1] == {"subject": "Hello Name 2", "html": "<p>Dear Name 2</p>",
                                 "text": None}  # fmt: skip
    assert not redis_client.keys("postroom:*")


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_what_is_wrong_with_the_call_is_named(more: list[str], postroom: Command, rows: Path,
                                              html: Path):  # fmt: skip
    """An unknown pool, a bad sender, a template that asks for a column that is not there."""
    base = ("send", rows, *more, "--html", html, "--subject")

    assert "no pool 'six'" in said(postroom(*base, "x", "--pool", "six"))
    assert "sender: " in said(postroom(*base, "x", "--sender", "nobody"))
    assert 'variable "phone" is missing' in said(postroom(*base, "{{ phone }}", "--sender", SENDER))
    assert "TPL_SYNTAX" in said(postroom(*base, "{{ name", "--sender", SENDER))


def test_an_unreadable_template_is_named(postroom: Command, rows: Path, tmp_path: Path):
    """File and reason, no traceback."""
    latin = tmp_path / "latin.html"
    latin.write_bytes("Grüße".encode("latin-1"))
    words = ("send", rows, "--sender", SENDER, "--subject", "x")

    absent = said(postroom(*words, "--html", tmp_path / "absent.html"))

    assert "absent.html: cannot be read: No such file or directory" in absent
    assert "latin.html: is not UTF-8" in said(postroom(*words, "--html", latin))


# ---- batches and messages --------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["batch status", "batch watch", "batch retry", "batch export", "message show"]
)
def test_what_does_not_exist_is_said_in_one_line(what: str, postroom: Command):
    """The same line on both databases, and as a document with --json."""
    wanted = str(uuid4())

    done = postroom(*what.split(), wanted, "--json")

    assert said(done) == f"postroom: no {what.split(maxsplit=1)[0]} {wanted}"
    assert json.loads(done.stdout) == {"error": f"no {what.split(maxsplit=1)[0]} {wanted}"}


# The database is asked in vain by PostgreSQL's own words: it refuses what is no UUID.
@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
@pytest.mark.parametrize("what", ["batch status", "batch retry", "batch export", "message show"])
def test_a_malformed_id_is_one_that_does_not_exist(what: str, postroom: Command):
    """A slip of the keyboard is no error of the database."""
    assert "'7e': an id is a UUID" in said(postroom(*what.split(), "7e"))


def test_the_list_shows_the_newest_batch_first(
    postroom: Command, rows: Path, html: Path, redis_url: str, engine: Engine
):
    """With counts; a table for people carries whole ids and no markup."""
    ids = [send_three(postroom, rows, html, "--name", name)["batch_id"] for name in ("a", "[b]c")]
    arrive(redis_url, engine)

    listed = document(postroom("batch", "list", "--json"))
    table = postroom("batch", "list").stdout

    assert [batch["batch_id"] for batch in listed] == ids[::-1]
    assert listed[0]["counts"]["queued"] == 3
    assert re.search(rf"^{ids[1]}  \[b\]c  running  3 +3 queued", table, re.MULTILINE)
    assert "\x1b" not in table


def test_status_names_suspended_mailboxes_and_the_time_to_go(
    ended: str, postroom: Command, engine: Engine, redis_client: redis.Redis
):
    """Why a batch stands still is part of its status; while no worker runs, no time is promised."""
    since = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    with engine.begin() as connection:
        for address in (SENDER, "other@contoso.com"):
            connection.execute(
                insert(mailboxes).values(
                    address=address, suspended_at=since, suspended_code="ErrorAccessDenied",
                    suspended_reason="access is denied",
                )
            )  # fmt: skip
    document(postroom("batch", "retry", ended, "--json"))

    assert document(postroom("batch", "status", ended, "--json"))["eta"] is None
    redis_client.set("postroom:worker:host:1:abc", "1", ex=60)
    status = document(postroom("batch", "status", ended, "--json"))

    assert status["blocked"] == [{"mailbox": SENDER, "code": "ErrorAccessDenied",
                                  "reason": "access is denied",
                                  "since": "2026-01-02T03:04:05Z"}]  # fmt: skip
    assert status["rate_per_minute"] == 1
    assert 10 <= status["eta"] <= 60  # one message is left, at the pace of the last minute
    assert f"blocked: {SENDER}" in postroom("batch", "status", ended).stdout


def test_watch_ends_with_the_batch_and_tells_of_failures_by_its_status(
    ended: str, postroom: Command
):
    """A script that waits for a batch learns whether all is well."""
    done = postroom("batch", "watch", ended, "--json")

    assert "1 failed, 1 unknown" in said(done)
    assert json.loads(done.stdout)["state"] == "finished"


def test_watch_waits_for_the_end(
    postroom: Command, rows: Path, html: Path, redis_url: str, migrated_url: str, engine: Engine,
    processes: Processes,
):  # fmt: skip
    """It shows the way there, and succeeds when every message was sent."""
    batch_id = send_three(postroom, rows, html)["batch_id"]
    env = {"POSTROOM_REDIS_URL": redis_url, "POSTROOM_DATABASE_URL": migrated_url}
    watching = processes.start(["postroom", "batch", "watch", batch_id], env, log="watch")
    wait_until(lambda: "open: 3 queued" in watching.tail(), "the inbox is shown")
    arrive(redis_url, engine)
    wait_until(lambda: "running: 3 queued" in watching.tail(), "the rows are shown")
    for position in (1, 2, 3):
        move(engine, batch_id, position, State.SENT, sent_at=datetime.now(UTC))

    assert watching.running
    finish(engine)
    assert watching.process.wait(20) == 0
    assert "finished" in watching.tail()


def test_retry_queues_the_failed_and_writes_who_and_why(ended: str, postroom: Command):
    """The unknown stay unless asked for; the event says by whom and why."""
    first = document(postroom("batch", "retry", ended, "--by", "ada", "--why", "mended", "--json"))
    both = document(postroom("batch", "retry", ended, "--include-unknown", "--json"))
    exported = postroom("batch", "export", ended, "--format", "jsonl").stdout.splitlines()
    shown = document(postroom("message", "show", json.loads(exported[1])["id"], "--json"))

    assert first == {"requeued": 1, "left": {"sent": 1, "unknown": 1}}
    assert both["requeued"] == 1
    first_event = shown["events"][0]
    assert [first_event[key] for key in ("kind", "by", "why")] == ["retry", "ada", "mended"]
    assert shown["events"][1]["by"]
    assert shown["state"] == "queued"


def test_a_retry_may_be_narrowed_and_tried_out_first(ended: str, postroom: Command):
    """By code and by time; a dry run answers the same and changes nothing."""
    narrow = ("batch", "retry", ended, "--include-unknown", "--code", "ErrorInvalidRecipients")
    would = document(postroom(*narrow, "--dry-run", "--json"))
    long_since = document(postroom(*narrow, "--since", "2h", "--json"))
    told = postroom(*narrow, "--dry-run").stdout

    assert would == {"requeued": 1, "left": {"sent": 1, "unknown": 1}}
    assert long_since["requeued"] == 0  # it was never tried
    assert told == "1 would be queued again; left: 1 sent, 1 unknown\n"
    assert document(postroom(*narrow, "--json")) == would


def test_a_batch_is_paused_resumed_and_cancelled_whether_it_arrived_or_not(
    postroom: Command, rows: Path, html: Path, redis_url: str, engine: Engine
):
    """All of it still lies in the inbox when it is paused; what arrives then waits."""
    batch_id = send_three(postroom, rows, html)["batch_id"]

    paused = document(postroom("batch", "pause", batch_id, "--by", "ada", "--json"))
    assert paused == {"batch_id": batch_id, "state": "open", "queued": 3, "in_flight": 0}
    assert document(postroom("batch", "status", batch_id, "--json"))["counts"]["queued"] == 3
    arrive(redis_url, engine)
    assert document(postroom("batch", "status", batch_id, "--json"))["state"] == "paused"

    resumed = postroom("batch", "resume", batch_id, "--why", "mended")
    assert resumed.stdout == f"batch {batch_id} is running: 3 queued, 0 in flight\n"
    assert "no worker is running" in resumed.stderr

    done = document(postroom("batch", "cancel", batch_id, "--json"))
    assert done == {"batch_id": batch_id, "state": "cancelled", "cancelled": 3, "in_flight": 0,
                    "unknown": 0}  # fmt: skip
    assert document(postroom("batch", "cancel", batch_id, "--json")) == done
    line = said(postroom("batch", "resume", batch_id))
    assert line.endswith(f"batch {batch_id} is cancelled: it cannot be resumed")
    with engine.connect() as connection:
        told = connection.execute(select(events.c.kind, events.c.by, events.c.why))
        assert [row.kind for row in told] == ["pause", "resume", "cancel"]


def test_a_batch_cancelled_in_the_inbox_ends_as_it_arrives(
    postroom: Command, rows: Path, html: Path, redis_url: str, engine: Engine
):
    """Nothing of it is ever queued, and until then its messages are not lost sight of."""
    batch_id = send_three(postroom, rows, html)["batch_id"]
    postroom("batch", "cancel", batch_id)

    before = document(postroom("batch", "status", batch_id, "--json"))
    arrive(redis_url, engine)
    after = document(postroom("batch", "status", batch_id, "--json"))

    assert (before["state"], sum(before["counts"].values())) == ("cancelled", 3)
    assert (after["state"], after["counts"]["cancelled"]) == ("cancelled", 3)


def test_an_export_has_every_message_in_every_format(ended: str, postroom: Command):
    """The same rows and columns as CSV, as lines of JSON and as one document."""
    written = postroom("batch", "export", ended, "--format", "jsonl").stdout
    lines = [json.loads(line) for line in written.splitlines()]
    table = list(csv.DictReader(io.StringIO(postroom("batch", "export", ended).stdout)))

    assert [line["position"] for line in lines] == [1, 2, 3]
    assert [line["state"] for line in lines] == ["sent", "failed", "unknown"]
    assert list(lines[0]) == ["id", "position", "to", "mailbox", "state", "attempts", "error_code",
                              "request_id", "sent_at", "bounced"]  # fmt: skip
    assert lines[0]["sent_at"].endswith("Z")
    assert document(postroom("batch", "export", ended, "--json")) == lines
    assert table == [{k: "" if v is None else str(v) for k, v in line.items()} for line in lines]


def test_an_export_into_a_closed_pipe_is_quiet(ended: str, redis_url: str, migrated_url: str):
    """`postroom batch export ID | head -1` shows a line and no traceback."""
    done = subprocess.run(
        ["sh", "-c", f"'{POSTROOM}' batch export {ended} | true"],
        env=clean_environment()
        | {"POSTROOM_REDIS_URL": redis_url, "POSTROOM_DATABASE_URL": migrated_url},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.stderr == ""


def test_a_message_shows_its_attempts_and_events(ended: str, postroom: Command):
    """The auditor's question: what happened to this one?"""
    first = document(postroom("batch", "export", ended, "--json"))[0]
    shown = document(postroom("message", "show", first["id"].upper(), "--json"))

    assert (shown["id"], shown["state"], shown["to"]) == (first["id"], "sent", "p1@fabrikam.com")
    assert (shown["attempts"], shown["events"]) == ([], [])
    assert "p1@fabrikam.com" in postroom("message", "show", first["id"]).stdout


def test_a_messages_story_is_told_in_the_order_in_which_it_happened(
    ended: str, postroom: Command, engine: Engine
):
    """An attempt in doubt, a look, and the answer that came late: one table, by time."""
    one = document(postroom("batch", "export", ended, "--json"))[1]["id"]
    noon = datetime(2026, 6, 1, 12, tzinfo=UTC)
    tried = {"message_id": one, "batch_id": ended, "mailbox": "m@contoso.com", "recipients": 1}
    with engine.begin() as connection:
        connection.execute(
            insert(attempts),
            [
                tried | {"fence": 1, "late": False, "outcome": "unknown", "at": noon},
                tried | {"fence": 1, "late": True, "outcome": "accepted",
                         "at": noon + timedelta(minutes=2)},
            ],
        )  # fmt: skip
        connection.execute(
            insert(events).values(
                at=noon + timedelta(minutes=1), kind="look", message_id=one, batch_id=ended,
                by="postroom", why="not there yet",
            )
        )  # fmt: skip

    shown = postroom("message", "show", one).stdout

    told = [shown.index(words) for words in ("unknown  ", "not there yet", "accepted (late)")]
    assert told == sorted(told)


# ---- simulator -------------------------------------------------------------------------------


def test_the_simulator_says_how_to_reach_it_and_ends_on_a_signal(processes: Processes):
    """A program reads the address; nothing is left behind."""
    child = processes.start(["postroom", "simulator", "--json", "--latency-ms=1"], log="simulator")
    wait_until(lambda: child.tail().endswith("\n"), "the document")
    told = json.loads(child.tail())
    bundle = Path(told["environment"]["POSTROOM_CA_BUNDLE"])

    assert told["environment"]["POSTROOM_GRAPH_URL"] == told["url"]
    assert bundle.exists()
    assert child.stop() == 0
    assert not bundle.parent.exists()
