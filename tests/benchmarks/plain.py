"""Plain Celery, as a team would write it first: one task a message, httpx, MSAL, one commit each.

`celery -A tests.benchmarks.plain worker`; the environment says where everything is. A connection
and a token are kept for each process (prefork) or thread, as their documentation advises.
"""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from typing import Any

import httpx
import msal
import sqlalchemy
from celery import Celery
from jinja2 import Environment
from sqlalchemy import Column, DateTime, Integer, MetaData, String, Table

from tests.benchmarks.letters import HTML, SUBJECT

GRAPH = os.environ["POSTROOM_GRAPH_URL"]
SCOPES = ["https://graph.microsoft.com/.default"]

app = Celery("plain", broker=os.environ["PLAIN_BROKER"])
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    broker_connection_retry_on_startup=True,
    task_default_queue="plain",
)

metadata = MetaData()
sent = Table(
    "plain_sent",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("reference", String(40), index=True),
    Column("mailbox", String(200)),
    Column("recipient", String(200)),
    Column("status", Integer),
    Column("request_id", String(100)),
    Column("at", DateTime(timezone=True)),
)

_jinja = Environment(autoescape=True)
_subject, _html = _jinja.from_string(SUBJECT), _jinja.from_string(HTML)
_local = threading.local()
_lock = threading.Lock()
_made: dict[str, Any] = {}


def engine() -> sqlalchemy.Engine:
    """One a process."""
    with _lock:
        if "engine" not in _made:
            _made["engine"] = sqlalchemy.create_engine(
                os.environ["PLAIN_DATABASE"], pool_size=20, pool_pre_ping=True
            )
        found: sqlalchemy.Engine = _made["engine"]
        return found


def token() -> str:
    """From MSAL's cache in memory, or from Entra."""
    with _lock:
        if "msal" not in _made:
            _made["msal"] = msal.ConfidentialClientApplication(
                os.environ["POSTROOM_CLIENT_ID"],
                client_credential=os.environ["POSTROOM_CLIENT_SECRET"],
                authority=f"{os.environ['POSTROOM_AUTHORITY']}/{os.environ['POSTROOM_TENANT_ID']}",
                instance_discovery=False, verify=os.environ["POSTROOM_CA_BUNDLE"],
            )  # fmt: skip
        return str(_made["msal"].acquire_token_for_client(SCOPES)["access_token"])


def http() -> httpx.Client:
    """One a thread."""
    if not hasattr(_local, "http"):
        import ssl

        trust = ssl.create_default_context(cafile=os.environ["POSTROOM_CA_BUNDLE"])
        _local.http = httpx.Client(base_url=GRAPH, verify=trust, timeout=30)
    client: httpx.Client = _local.http
    return client


@app.task(
    name="plain.send",
    rate_limit=os.environ.get("PLAIN_RATE_LIMIT") or None,
    autoretry_for=(httpx.HTTPError,),
    retry_backoff=True,
    max_retries=10,
)
def send(reference: str, mailbox: str, to: str, variables: dict[str, Any]) -> None:
    """Sends one mail and notes it."""
    message = {
        "subject": _subject.render(variables),
        "body": {"contentType": "html", "content": _html.render(variables)},
        "toRecipients": [{"emailAddress": {"address": to}}],
        "internetMessageHeaders": [{"name": "x-reference", "value": reference}],
    }
    answer = http().post(
        f"/v1.0/users/{mailbox}/sendMail",
        json={"message": message, "saveToSentItems": True},
        headers={"Authorization": f"Bearer {token()}"},
    )
    answer.raise_for_status()
    with engine().begin() as connection:
        connection.execute(sent.insert().values(
            reference=reference, mailbox=mailbox, recipient=to, status=answer.status_code,
            request_id=answer.headers.get("request-id"), at=datetime.now(UTC),
        ))  # fmt: skip
