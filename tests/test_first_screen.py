"""Trouble as a new operator meets it: the first screen of `batch status` or `doctor` names the
place, the code, the cause and the command to run.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.post_kit import SENDER, Post, opened
from tests.store_kit import sqlite_only
from tests.support import Processes, clean_environment, wait_until
from worker.model import Message, Template
from worker.report import ALIVE
from worker.servers import RedisServer

pytestmark = sqlite_only  # both databases are asked in the same words

POSTROOM = str(Path(sys.executable).with_name("postroom"))
#: A terminal as it opens.
COLUMNS, ROWS = 100, 40
START = "start one: celery -A worker worker -P threads -c 32 -l INFO"


@dataclass
class Operator:
    """Somebody at a terminal, who has the documents and a service with its simulator."""

    post: Post
    environment: dict[str, str]

    def batch(self, count: int = 3, **arguments: Any) -> str:
        """A batch that waits in SQL; its id."""
        batch = self.post.enqueue(
            *(Message(f"p{n}@example.org", variables={"n": n}) for n in range(count)),
            template=Template("News", text="Hello {{ n }}"), **arguments,
        ).batch_id  # fmt: skip
        self.post.ingest()
        return batch

    def screen(self, *words: str, ends: int = 0) -> list[str]:
        """The lines that a command shows, which are no more than a screen."""
        done = subprocess.run(
            [POSTROOM, *words], env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        assert done.returncode == ends, done.stdout
        assert sum(1 + len(line) // COLUMNS for line in lines) <= ROWS, done.stdout
        return lines

    def status(self, batch: str) -> list[str]:
        return self.screen("batch", "status", batch)

    def doctor(self, *words: str) -> dict[str, str]:
        """What the doctor says at last of each check that failed, with what to do about it."""
        lines = self.screen("doctor", *words, ends=1)
        last = lines[lines.index("") + 1 : -1]
        return {
            check.split()[1].rstrip(":"): f"{check}{fix}"
            for check, fix in zip(last[::2], last[1::2], strict=True)
        }


@pytest.fixture
def redis_url(own_redis: RedisServer) -> str:
    """A Redis of the test's own, which it may stop."""
    return own_redis.url


@pytest.fixture
def operator(tmp_path: Path, redis_url: str, migrated_url: str) -> Iterator[Operator]:
    with opened(tmp_path, redis_url, migrated_url) as post:
        urls = {"POSTROOM_REDIS_URL": redis_url, "POSTROOM_DATABASE_URL": migrated_url}
        yield Operator(post, clean_environment() | post.simulator.environment() | urls)


def assert_says(text: str, *words: str) -> None:
    assert not [word for word in words if word not in text], text


def line(lines: list[str], start: str) -> str:
    """The only line that begins so."""
    [found] = [one for one in lines if one.startswith(start)]
    return found


def test_a_wrong_secret_is_named_with_entra_s_code_and_the_setting(operator: Operator) -> None:
    """The batch waits, and its status says for what; so does the doctor."""
    operator.post.simulator.settings(client_secret="another")
    batch = operator.batch()
    operator.post.deliver()

    status = operator.status(batch)
    doctor = operator.doctor("--mailbox", SENDER)

    assert_says(line(status, "blocked: "), SENDER, "AADSTS7000215", "The client secret is wrong",
                "POSTROOM_CLIENT_SECRET")  # fmt: skip
    assert_says(line(status, "run: "), f"postroom doctor --mailbox {SENDER}")
    assert_says(doctor["credential"], "AADSTS7000215", "The client secret is wrong",
                "-> Set POSTROOM_CLIENT_SECRET", "docs/entra-setup.md, step 4")  # fmt: skip


def test_a_secret_mended_where_the_workers_do_not_read_it_is_told(operator: Operator) -> None:
    """What they were told stands until they are restarted, whoever asks with the new one."""
    operator.post.simulator.settings(client_secret="another")
    batch = operator.batch()
    operator.post.deliver()
    operator.post.runtime.redis.set(f"{ALIVE}one", "1", ex=60)
    operator.environment["POSTROOM_CLIENT_SECRET"] = "another"

    status = operator.status(batch)
    doctor = operator.doctor()
    listed = operator.screen("mailbox", "list")

    assert_says(line(status, "blocked: "), SENDER, "AADSTS7000215", "restart them")
    assert_says(doctor["workers"], "1 running", "AADSTS7000215", " since 20", "restart them")
    assert_says(line(listed, "postroom: "), "nothing is sent", "AADSTS7000215", "postroom doctor")


def test_a_wrong_secret_that_does_not_show_yet_is_told_with_the_hour(operator: Operator) -> None:
    """The workers send with the token that they share, and until it has ended all is well."""
    batch = operator.batch()
    operator.post.deliver()
    operator.post.simulator.settings(client_secret="another")

    doctor = operator.doctor()
    status = operator.status(batch)

    ends = operator.post.runtime.tokens.shared_until()
    assert ends
    assert_says(doctor["credential"], "AADSTS7000215", f"they share until {ends:%H:%MZ}")
    assert not [one for one in status if one.startswith(("blocked", "run"))]


def test_a_batch_that_was_sent_in_spite_of_it_names_no_block(operator: Operator) -> None:
    """Others of the pool sent it: there is nothing to do for this batch."""
    operator.post.client.set_pool("notices", [SENDER, "other@contoso.com"])
    operator.post.client.suspend_mailbox("other@contoso.com")
    batch = operator.batch(sender=None, pool="notices")

    waiting = operator.status(batch)
    operator.post.deliver()
    ended = operator.status(batch)

    assert line(waiting, "blocked: ")
    assert line(ended, "sent").split() == ["sent", "3"]
    assert not [one for one in ended if one.startswith(("blocked", "run"))]


def test_one_cause_of_many_mailboxes_is_one_line(operator: Operator) -> None:
    """A pool of twelve does not fill the screen with what is said once."""
    names = [f"n{number:02}@contoso.com" for number in range(12)]
    operator.post.client.set_pool("notices", names)
    operator.post.simulator.settings(client_secret="another")
    batch = operator.batch(sender=None, pool="notices")
    operator.post.deliver(names[0])

    said = line(operator.status(batch), "blocked: ")

    assert_says(said, "12 mailboxes (n00@contoso.com, n01@contoso.com and 10 more)", "AADSTS")


def test_a_mailbox_out_of_scope_is_named_until_it_is_resumed(operator: Operator) -> None:
    """First the step in Exchange; once the mailbox is admitted, the command that sends on."""
    operator.post.simulator.settings(out_of_scope=[SENDER])
    batch = operator.batch()
    operator.post.deliver()

    status = operator.status(batch)
    without = operator.doctor()
    refused = operator.doctor("--mailbox", SENDER)
    operator.post.simulator.settings(out_of_scope=[])
    admitted = operator.doctor("--mailbox", SENDER)
    [command] = re.findall(r"run: postroom (.*)", admitted["mailboxes"])
    operator.screen(*command.split())
    operator.post.deliver()

    assert_says(line(status, "blocked: "), SENDER, "ErrorAccessDenied", "may not send")
    assert_says(line(status, "run: "), f"postroom doctor --mailbox {SENDER}")
    assert_says(without["mailboxes"], SENDER, "ErrorAccessDenied", "may not send",
                f"run: postroom doctor --mailbox {SENDER}")  # fmt: skip
    assert_says(refused["mailbox"], SENDER, "ErrorAccessDenied", "outside the application's scope",
                f"Add-DistributionGroupMember GROUP -Member {SENDER}", "step 5")  # fmt: skip
    assert operator.post.client.status(batch)["counts"]["sent"] == 3


def test_a_redis_that_is_stopped_is_named_with_its_address(
    operator: Operator, own_redis: RedisServer
) -> None:
    """What lies in SQL is shown all the same."""
    batch = operator.batch()
    own_redis.kill()

    status = operator.status(batch)
    doctor = operator.doctor()

    assert_says(line(status, "postroom: "), "Redis does not answer (ConnectionError)",
                "nothing is sent", "postroom doctor")  # fmt: skip
    assert line(status, "queued").split() == ["queued", "3"]
    assert_says(doctor["redis"], "ConnectionError", f"{own_redis.directory}/redis.sock",
                "start it (docker compose up -d redis)", "POSTROOM_REDIS_URL")  # fmt: skip


def test_a_killed_worker_is_missed_and_what_it_held_is_named(
    operator: Operator, processes: Processes
) -> None:
    """While none runs, how to start one; when the next has ended its claims, how to settle them. So
    says Flower, too.
    """
    operator.post.simulator.fault("hang_before", 0)
    batch = operator.batch()
    short = {"POSTROOM_REQUEST_TIMEOUT": "1s", "POSTROOM_LEASE": "2s"}
    command = ["celery", "-A", "worker", "worker", "-P", "threads", "-c", "2", "-l", "INFO"]
    client, redis = operator.post.client, operator.post.runtime.redis
    victim = processes.start(command, operator.environment | short)
    wait_until(lambda: client.status(batch)["counts"]["sending"] == 3, "all are claimed", 30)
    victim.kill()
    redis.delete(*redis.scan_iter(f"{ALIVE}*"))  # as some seconds do

    missing, doctor = operator.status(batch), operator.doctor()
    operator.post.simulator.clear_faults()
    second = processes.start(command, operator.environment | short)
    wait_until(lambda: "BatchHasTrouble" in second.tail(100_000), "the batch has ended", 30)
    ended = operator.status(batch)

    which, settle = (f"postroom message find --batch {batch} --state unknown",
                     f"postroom batch settle {batch} --as ")  # fmt: skip
    assert_says(line(missing, "postroom: "), "no worker is running", START)
    assert_says(doctor["workers"], "none is running, and messages wait", START)
    assert_says(line(ended, "unknown: 3: "), "LeaseExpired", "The worker that was sending it ended")
    assert_says(line(ended, "    row 1, "), SENDER, "was not heard of again")
    assert [one.split("  # ")[0] for one in ended if one.startswith("run: ")] == [
        f"run: {which}", f"run: {settle}sent",
    ]  # fmt: skip
    assert f"3 unknown; to settle: {which}, then {settle}..." in second.tail(100_000)


def test_a_bad_template_is_named_by_its_line_or_variable_or_what_graph_said(
    operator: Operator,
) -> None:
    """Nothing of a template that cannot be filled is taken; what Graph rejects pauses its batch."""
    rows, body = Path("rows.csv"), Path("body.html")
    rows.write_text("to,name\nann@example.org,Ann\n")
    send = ("send", "rows.csv", "--sender", SENDER, "--subject", "Hello", "--html", "body.html")
    operator.post.simulator.fault("status", 0, status=400, code="ErrorMimeContentInvalid")
    batch = operator.batch(6, max_failures=3)
    operator.post.deliver()

    paused = operator.status(batch)
    body.write_text("<p>\nDear {{ name</p>")
    [syntax] = operator.screen(*send, ends=1)
    body.write_text("Dear {{ nmae }}")
    missing = operator.screen(*send, ends=1)

    assert_says(
        line(paused, "paused"), "messages in a row were rejected", "ErrorMimeContentInvalid"
    )
    assert_says(line(paused, "failed: 4: "), "Graph does not accept the message")
    assert_says(line(paused, "    row 1, "), SENDER, "Simulated fault")
    assert [one.split()[3:5] for one in paused if one.startswith("run: ")] == [
        ["resume", batch], ["retry", batch],
    ]  # fmt: skip
    assert_says(syntax, f"--html {body}: line 2: ", "TPL_SYNTAX")
    assert_says(missing[-1], "nothing was sent", "rows.csv", "line 2", "template.html",
                '"nmae" is missing', "TPL_VAR_MISSING")  # fmt: skip
