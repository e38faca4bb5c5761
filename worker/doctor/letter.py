"""A real mail from a mailbox to itself: sent, found again by its marker, its delay told.

Then the questions about Microsoft's side that no document settles: what this run answers of them,
and what stays open.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta

from redis.exceptions import RedisError

from worker.doctor.lane import Busy, borrowed
from worker.doctor.microsoft import cannot_tell, post
from worker.doctor.values import Check, Status, Visit, failed, passed, skipped, warned
from worker.graph import payload
from worker.model import Accepted, Forbidden, Found, Look

NAME = "letter"
#: So long the mail is looked for; what Graph accepted may stay in Drafts for a while.
PATIENCE = timedelta(minutes=2)
BETWEEN = timedelta(seconds=1)


def letter(visit: Visit) -> Iterator[Check]:
    """Only with --send, and only from a mailbox that may be sent from."""
    if not visit.send:
        yield skipped(NAME, "not asked for: --mailbox ADDRESS --send sends one real mail")
        return
    if not visit.admitted or visit.mailbox is None:
        yield skipped(NAME, "not sent: the mailbox may not be sent from")
        return
    marker, address = str(uuid.uuid4()), visit.mailbox
    try:
        outcome = visit.rt.call(
            borrowed(
                visit.rt, address.lower(), lambda: post(visit, address, _body(address, marker))
            )
        )
        if not isinstance(outcome, Accepted):
            yield cannot_tell(NAME, address, outcome)
            return
        seconds, look = visit.rt.call(_find(visit, address, marker))
    except (Busy, RedisError) as error:
        yield warned(NAME, f"{address}: {error}", "run it again when the mailbox is idle")
        return
    yield _told(address, marker, seconds, look)
    yield from questions(visit, look)


def _body(address: str, marker: str) -> bytes:
    text = f"Postroom's doctor sent this mail from {address} to itself. Marker: {marker}"
    subject = f"Postroom doctor {marker}"
    content = {"to": [{"address": address}]}
    return payload(content, message_id=marker, subject=subject, html=None, text=text)


async def _find(visit: Visit, address: str, marker: str) -> tuple[float, Look]:
    """Looks until it is found, may not be looked for, or has taken too long."""
    token = visit.token.value if visit.token else ""
    began = time.monotonic()
    while True:
        look = await borrowed(
            visit.rt, address.lower(), lambda: visit.rt.graph.look(address, marker, token)
        )
        took = time.monotonic() - began
        if isinstance(look, Found | Forbidden) or took > PATIENCE.total_seconds():
            return took, look
        await asyncio.sleep(BETWEEN.total_seconds())


def _told(address: str, marker: str, seconds: float, look: Look) -> Check:
    if isinstance(look, Found):
        return passed(NAME, f"sent to {address}, and found by its marker after {seconds:.1f} s")
    if isinstance(look, Forbidden):
        return warned(
            NAME,
            f"accepted, but not to be looked for without Mail.Read ({look.answer.code})",
            f"look into {address} for the subject: Postroom doctor {marker}",
        )
    return failed(
        NAME,
        f"Graph accepted it, but {seconds:.0f} s later it was not found ({look.answer.status})",
        f"look into {address}, Drafts too, for the subject: Postroom doctor {marker}; set "
        "POSTROOM_ON_UNKNOWN=hold until searches find what was sent",
    )


def questions(visit: Visit, look: Look) -> Iterator[Check]:
    """What no document settles. Answered by this run, or open."""
    if isinstance(look, Found):
        yield passed("marker on the sent copy", "yes: the search for it found the mail")
    else:
        yield _open("marker on the sent copy", "does a search by the marker find what was sent?")
    if visit.roles is not None and "Mail.Send" not in visit.roles:
        yield passed("roles with RBAC", "no: the mail was accepted on a token without Mail.Send")
    else:
        yield _open("roles with RBAC", "does a scope by RBAC alone show in the token's roles?")
    yield _open("time in Drafts", "how long may an accepted mail stay in Drafts?")
    yield _open("messages a minute", "do 30 a minute hold for Graph as for SMTP? If mails come "
                "late, set POSTROOM_MAILBOX_MESSAGE_RATE=30/min")  # fmt: skip
    yield _open("503 on sendMail", "is a mail ever accepted with it? Postroom takes it for doubt")
    yield _open("immutable id", "does a draft's id find the sent copy? Postroom asks by marker")
    yield _open("second send of a draft", "what does Graph answer? Postroom then looks")


def _open(name: str, question: str) -> Check:
    return Check(name, Status.OPEN, question)
