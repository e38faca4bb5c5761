"""Sends one claimed message, with its attachments if it has any.

Up to 3 MB of them go in the request itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from worker.deliver.values import Deps, Prepared
from worker.graph import file_attachment, payload
from worker.model import Answer, NotSent, Outcome
from worker.policy import CONTENT_MISSING
from worker.tokens import Token

log = logging.getLogger(__name__)

#: A content that has not arrived is looked for again after so long: a worker may be writing it.
ARRIVAL = timedelta(seconds=15)


async def send(
    deps: Deps, mailbox: str, prepared: Prepared, token: Token, *, deadline: float
) -> Outcome:
    """What came of it. `deadline`: from then on no request must leave (monotonic)."""
    body = prepared.body
    if references := prepared.due.content.get("attachments"):
        try:
            whole = await asyncio.to_thread(_with_contents, deps, prepared, references)
        except SQLAlchemyError as error:
            log.warning("message %s: its attachments cannot be read (%s)",
                        prepared.due.id, type(error).__name__)  # fmt: skip
            whole = None
        if whole is None:
            return _content_missing()
        body = whole
    return await deps.graph.send(mailbox, body, token.value, deadline=deadline)


def _with_contents(
    deps: Deps, prepared: Prepared, references: Sequence[Mapping[str, Any]]
) -> bytes | None:
    """The whole request; None where a content is not there."""
    found = []
    for one in references:
        content = deps.store.contents.whole(one["sha256"], one["size"])
        if content is None:
            return None
        found.append(file_attachment(one, content))
    assert prepared.shown is not None  # noqa: S101  (what has no problem was rendered)
    shown = asdict(prepared.shown)
    due = prepared.due
    return payload(due.content, message_id=due.id, attachments=found, **shown)


def _content_missing() -> NotSent:
    detail = "an attachment's content is not in the database yet, or cannot be read from it"
    return NotSent(Answer(code=CONTENT_MISSING, detail=detail, retry_after=ARRIVAL))
