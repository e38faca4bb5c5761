"""From what is due to what is asked of the gate: the request, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker import templates
from worker.deliver.values import Prepared, attached
from worker.graph import payload
from worker.limits import Cost, outside
from worker.model import Answer, Due, Rejected


def prepare(
    due: Due, template: Mapping[str, Any] | None, *, shared: bool, internal: frozenset[str]
) -> Prepared:
    """The request of a message; a template that fails is the message's own rejection."""
    content = due.content
    try:
        shown = templates.render(template, content)
    except templates.TemplateProblem as problem:
        refused = Rejected(Answer(code=problem.code, detail=problem.detail))
        return Prepared(due, shared, b"", Cost(0), refused)
    body = payload(
        content, message_id=due.id, subject=shown.subject, html=shown.html, text=shown.text
    )
    addresses = (one["address"] for kind in ("to", "cc", "bcc") for one in content.get(kind) or ())
    size = len(body) + attached(content)
    cost = Cost(1, 1, due.recipients, size, outside(addresses, internal))
    return Prepared(due, shared, body, cost, shown=shown)
