"""From what is due to what is asked of the gate: the request, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from worker import templates
from worker.deliver.values import Prepared, attached
from worker.graph import payload
from worker.limits import Cost, outside
from worker.model import Answer, Due, NotSent, Rejected
from worker.policy import HOUR, OVER_LIMIT
from worker.staging import NO_STAGING, RCPT_POLICY, Staging, addresses, refusal, staged
from worker.store.arrivals import UNREADABLE


def prepare(
    due: Due, template: Mapping[str, Any] | None, *, shared: bool, internal: frozenset[str],
    staging: Staging = NO_STAGING,
) -> Prepared:  # fmt: skip
    """The request of a message; what may not be sent at all is the message's own rejection."""
    try:
        return _prepared(due, template, shared, internal, staging)
    except templates.TemplateProblem as problem:
        refused = Rejected(Answer(code=problem.code, detail=problem.detail))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # No producer of ours wrote it. It must not stop what is due behind it.
        detail = f"what lies in the database is no message ({type(error).__name__})"
        refused = Rejected(Answer(code=UNREADABLE, detail=detail))
    return Prepared(due, shared, b"", Cost(0), refused)


def _prepared(
    due: Due, template: Mapping[str, Any] | None, shared: bool, internal: frozenset[str],
    staging: Staging,
) -> Prepared:  # fmt: skip
    shown = templates.render(template, due.content)
    if staging:
        due, shown = _staged(staging, due, shown)
    content = due.content
    body = payload(
        content, message_id=due.id, subject=shown.subject, html=shown.html, text=shown.text
    )
    size = len(body) + attached(content)
    cost = Cost(1, 1, due.recipients, size, outside(addresses(content), internal))
    return Prepared(due, shared, body, cost, shown=shown)


def _staged(
    staging: Staging, due: Due, shown: templates.Rendered
) -> tuple[Due, templates.Rendered]:
    """The message as this test environment may send it. Raises TemplateProblem if it may not."""
    if (why := refusal(staging, due.content)) is not None:
        raise templates.TemplateProblem(RCPT_POLICY, "to", why)
    content, subject = staged(staging, due.content, shown.subject)
    count = len(addresses(content))
    return replace(due, content=content, recipients=count), replace(shown, subject=subject)


def too_large(prepared: Prepared, limit: str) -> Prepared:
    """A message that is more than a limit allows in all: it waits, and the others go on."""
    detail = f"the message alone is more than the limit of {limit} allows"
    return replace(
        prepared, problem=NotSent(Answer(code=OVER_LIMIT, detail=detail, retry_after=HOUR))
    )
