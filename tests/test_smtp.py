"""The SMTP door, tried with Python's smtplib: nothing is said to be taken that is not kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.proxy import before_redis
from tests.support import Processes, wait_until
from worker.client import Client
from worker.config import Settings
from worker.runtime import Runtime
from worker.servers import Child, RedisServer

SENDER = "notices@contoso.com"
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


class Door:
    """A running `postroom smtp`, and ways to look at what it took."""

    def __init__(self, processes: Processes, **environment: str) -> None:
        known = {"POSTROOM_SMTP_SENDERS": f"{SENDER},@fabrikam.com"} | environment
        self.environment = {name: value for name, value in known.items() if value}
        self.process: Child = processes.start(
            ["postroom", "smtp", "--port", "0", "--json"], env=self.environment, log="smtp"
        )
        told = wait_until(self._told, "the door is open", 60)
        self.host, self.port = told["host"], told["port"]

    def _told(self) -> Any:
        assert self.process.running, self.process.tail()
        lines = [line for line in self.process.tail().splitlines() if line.startswith("{")]
        return json.loads(lines[0]) if lines else None

    def connect(self) -> smtplib.SMTP:
        """A client of it."""
        return smtplib.SMTP(self.host, self.port, timeout=60)


def letter(**headers: str) -> EmailMessage:
    """A mail; a header's underscores are hyphens."""
    mail = EmailMessage()
    known = {"From": SENDER, "To": "ada@example.org", "Subject": "News"} | headers
    for name, value in known.items():
        mail[name.replace("_", "-")] = value
    mail.set_content("Hello\n")
    return mail


@pytest.fixture
def service(redis_url: str, migrated_url: str) -> Iterator[Runtime]:
    """The servers that the door writes to, seen from beside it."""
    runtime = Runtime(Settings(redis_url=redis_url, database_url=migrated_url))
    yield runtime
    runtime.close()
    runtime.redis.close()


@pytest.fixture
def door(processes: Processes, service: Runtime) -> Door:
    """A door with two allowed senders."""
    return Door(processes, **addresses(service))


def addresses(service: Runtime) -> dict[str, str]:
    """Where the servers are."""
    return {"POSTROOM_REDIS_URL": service.settings.redis_url,
            "POSTROOM_DATABASE_URL": str(service.settings.database_url)}  # fmt: skip


def kept(service: Runtime) -> list[list[Any]]:
    """The messages in the inbox: [recipient, content]."""
    entries: Any = service.redis.xrange("postroom:inbox")
    return [row[2:] for _, fields in entries for row in json.loads(fields[b"body"])]


@SQLITE
def test_a_mail_is_kept_before_250_is_said(door: Door, service: Runtime) -> None:
    """The answer names the batch, which is known from that moment; parts arrive as they were."""
    mail = letter(Reply_To="desk@contoso.com", X_Order="17")
    mail.add_alternative("<p>Hello</p>\n", subtype="html")
    mail.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="a.pdf")
    with door.connect() as client:
        refused = client.send_message(mail, SENDER, ["ada@example.org", "secret@example.org"])
        client.mail(SENDER)
        client.rcpt("bob@example.org")
        code, answer = client.data(letter(To="bob@example.org").as_bytes())
    assert (refused, code) == ({}, 250)
    batch_id = answer.decode().rpartition(" ")[2]
    assert Client(lambda: service).status(batch_id)["counts"]["queued"] == 1
    [recipient, content] = kept(service)[0]
    assert recipient == "ada@example.org"
    assert content["bcc"] == [{"address": "secret@example.org"}]
    assert (content["html"], content["text"]) == ("<p>Hello</p>\n", "Hello\n")
    assert content["headers"] == {"X-Order": "17"}
    assert content["attachments"][0]["name"] == "a.pdf"


@SQLITE
def test_the_same_mail_again_is_taken_and_adds_nothing(door: Door, service: Runtime) -> None:
    """After a lost answer a client comes again; to other recipients it is another mail."""
    mail = letter(Message_ID="<17@contoso.com>")
    with door.connect() as client:
        for recipients in (["ada@example.org"], ["ada@example.org"], ["bob@example.org"]):
            client.send_message(mail, SENDER, recipients)
        with pytest.raises(smtplib.SMTPDataError) as other:
            client.send_message(letter(Message_ID="<17@contoso.com>", X_A="1"), SENDER,
                                ["ada@example.org"])  # fmt: skip
    assert len(kept(service)) == 2
    assert other.value.smtp_code == 554


@SQLITE
def test_what_cannot_be_taken_is_refused_with_its_code(door: Door, service: Runtime) -> None:
    """Senders, addresses, contents: each with SMTP's own code and one line; nothing is kept."""
    with door.connect() as client:
        client.ehlo()
        assert client.mail("mallory@contoso.com")[0] == 550
        assert client.mail("anyone@fabrikam.com")[0] == 250
        assert client.rcpt("nobody")[0] == 501
        assert client.rcpt("a@b@c.org")[0] in {501, 553}
        assert client.rcpt("ada@example.org")[0] == 250
        forged = letter(From="mallory@contoso.com")
        assert client.data(forged.as_bytes())[0] == 550
        with pytest.raises(smtplib.SMTPDataError) as bad:
            client.send_message(letter(**{f"X_{n}": "1" for n in range(5)}))
        assert bad.value.smtp_code == 554
        assert b"HDR_MAX" in bad.value.smtp_error
        large = letter()
        large.set_content("word " * 250_000, cte="quoted-printable")
        with pytest.raises(smtplib.SMTPDataError) as long:
            client.send_message(large)
        assert long.value.smtp_code == 552
    assert service.redis.exists("postroom:inbox") == 0
    assert "Traceback" not in door.process.tail()


@SQLITE
def test_the_size_of_a_mail_has_a_limit(processes: Processes, service: Runtime) -> None:
    """It is told with EHLO, and more is refused: 552."""
    door = Door(processes, POSTROOM_SMTP_SIZE_LIMIT="20000", **addresses(service))
    with door.connect() as client:
        client.ehlo()
        assert client.esmtp_features["size"] == "20000"
        mail = letter()
        mail.add_attachment(os.urandom(30_000), maintype="a", subtype="b", filename="a")
        with pytest.raises(smtplib.SMTPResponseException) as large:
            client.send_message(mail)
    assert large.value.smtp_code == 552


@SQLITE
def test_a_redis_that_is_away_puts_mails_off(
    processes: Processes, own_redis: RedisServer, migrated_url: str
) -> None:
    """451, and the client comes again; then it is taken, once."""
    runtime = Runtime(Settings(redis_url=own_redis.url, database_url=migrated_url))
    with before_redis(own_redis) as line:
        url = f"redis://127.0.0.1:{line.port}/0"
        door = Door(processes, **addresses(runtime) | {"POSTROOM_REDIS_URL": url})
        mail = letter(Message_ID="<17@contoso.com>")
        with door.connect() as client:
            line.cut()
            with pytest.raises(smtplib.SMTPDataError) as away:
                client.send_message(mail)
            assert away.value.smtp_code == 451
            line.heal()
            client.send_message(mail)
    assert len(kept(runtime)) == 1
    runtime.close()
    runtime.redis.close()


@SQLITE
def test_beyond_this_machine_it_wants_tls_and_a_password(
    processes: Processes, service: Runtime, tmp_path: Path
) -> None:
    """It does not even start without; with them, no mail passes without either."""
    bare = processes.start(
        ["postroom", "smtp", "--host", "0.0.0.0", "--port", "0"],
        env=addresses(service) | {"POSTROOM_SMTP_SENDERS": SENDER}, log="bare",
    )  # fmt: skip
    assert wait_until(lambda: not bare.running, "it ended", 60)
    assert "POSTROOM_SMTP_USER" in bare.tail()

    authority = trustme.CA()
    pem = tmp_path / "smtp.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
    door = Door(processes, POSTROOM_SMTP_USER="app", POSTROOM_SMTP_PASSWORD="s3cret",
                POSTROOM_SMTP_CERTIFICATE_FILE=str(pem), **addresses(service))  # fmt: skip
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    with smtplib.SMTP("localhost", door.port, timeout=60) as client:
        client.ehlo()
        assert client.mail(SENDER)[0] == 530
        client.starttls(context=trust)
        client.ehlo()
        assert client.mail(SENDER)[0] == 530
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login("app", "wrong")
        client.login("app", "s3cret")
        client.send_message(letter())
    assert len(kept(service)) == 1
    assert "s3cret" not in door.process.tail()


@SQLITE
def test_without_senders_it_says_what_to_set(processes: Processes, service: Runtime) -> None:
    """Whoever may send must be named."""
    bare = processes.start(["postroom", "smtp", "--port", "0"], env=addresses(service), log="bare")
    assert wait_until(lambda: not bare.running, "it ended", 60)
    assert "POSTROOM_SMTP_SENDERS" in bare.tail()
    assert "Traceback" not in bare.tail()


@SQLITE
def test_a_stop_ends_the_door(door: Door) -> None:
    """SIGTERM: it ends by itself, in its own words."""
    with socket.create_connection((door.host, door.port)):
        door.process.signal(signal.SIGTERM)
        wait_until(lambda: not door.process.running, "it ended", 60)
    assert "Traceback" not in door.process.tail()


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs it to its end."""
    known = {"timeout": 60, "capture_output": True, "text": True, "check": False} | options
    found: subprocess.CompletedProcess[str] = subprocess.run(command, **known)  # noqa: PLW1510  (`check` is among them)
    return found


@pytest.mark.whole
@pytest.mark.timeout(600)
@SQLITE
def test_swaks_and_msmtp_find_the_door_open(door: Door, service: Runtime) -> None:
    """What Debian's administrators try first."""
    if not (shutil.which("swaks") and shutil.which("msmtp")):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "swaks", "msmtp"]):
            done = run(command, timeout=500, env=quiet)
            assert done.returncode == 0, done.stderr
    swaks = ["swaks", "--server", f"{door.host}:{door.port}", "--from", SENDER,
             "--to", "ada@example.org", "--header", "Subject: swaks"]  # fmt: skip
    done = run(swaks)
    assert done.returncode == 0, done.stdout
    assert "250 2.0.0 OK: enqueued as" in done.stdout
    msmtp = ["msmtp", f"--host={door.host}", f"--port={door.port}", "--auth=off", "--tls=off",
             f"--from={SENDER}", "bob@example.org"]  # fmt: skip
    content = f"From: {SENDER}\nTo: bob@example.org\nSubject: msmtp\n\nHello\n"
    done = run(msmtp, input=content)
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in kept(service)] == ["ada@example.org", "bob@example.org"]
