"""Sends one claimed message, with its attachments if it has any.

Up to 3 MB of them go in the request itself, more by a draft.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from worker.deliver.by_draft import ByDraft, content_missing
from worker.deliver.values import Deps, Prepared, fits
from worker.graph import file_attachment, payload
from worker.limits import Limits
from worker.model import Answer, NotSent, Outcome
from worker.policy import GATE_CLOSED, SECOND
from worker.tokens import Token

log = logging.getLogger(__name__)

#: Bytes of a whole request: Graph takes 4 MB, and some of it is not ours.
LARGEST_REQUEST = 4 * 1024 * 1024 - 64 * 1024


async def send(
    deps: Deps, mailbox: str, prepared: Prepared, token: Token, *, deadline: float, fence: int,
    limits: Limits,
) -> Outcome:  # fmt: skip
    """What came of it. `deadline`: from then on no request must leave (monotonic); `fence`: the
    claim's; `limits`: the mailbox's.
    """
    references = prepared.due.content.get("attachments")
    if not references:
        return await deps.graph.send(mailbox, prepared.body, token.value, deadline=deadline)
    try:
        if prepared.size > LARGEST_REQUEST or not fits(prepared.due.content):
            return await ByDraft(deps, mailbox, prepared, fence, token, deadline, limits).run()
        body = await asyncio.to_thread(_with_contents, deps, prepared, references)
    except RedisError as error:
        detail = f"Redis does not answer ({type(error).__name__})"
        return NotSent(Answer(code=GATE_CLOSED, detail=detail, retry_after=SECOND))
    except SQLAlchemyError as error:
        log.warning("message %s: its attachments cannot be read (%s)",
                    prepared.due.id, type(error).__name__)  # fmt: skip
        return content_missing()
    if body is None:
        return content_missing()
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
