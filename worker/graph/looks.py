"""A look into a mailbox: the search for a message's marker, and what its answers prove.

Only a whole answer proves anything. Above all, "absent" needs every page of the search: Graph may
give an empty page with more to come.
https://learn.microsoft.com/graph/paging
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from worker.graph.payload import MARKER_PROPERTY
from worker.graph.wire import Reply
from worker.model import Absent, Blame, Blocked, Forbidden, Found, Look, Trouble

#: So much of a page is read; the search asks for few fields of few messages.
PAGE_BYTES = 64 * 1024
#: So many pages are read before the search is given up.
PAGES = 5
#: The id that is given then still names the mail when it moves from Drafts to Sent Items.
#: https://learn.microsoft.com/graph/outlook-immutable-id
HEADERS = {"Prefer": 'IdType="ImmutableId"'}


def search(message_id: str) -> str:
    """The path below the mailbox. The whole of it is searched: what Graph accepted lies in Drafts
    first, and people move what they were sent.
    https://learn.microsoft.com/graph/api/singlevaluelegacyextendedproperty-get
    """
    marked = f"ep/id eq '{MARKER_PROPERTY}' and ep/value eq '{message_id}'"
    wanted = quote(f"singleValueExtendedProperties/any(ep: {marked})", safe="()/:'")
    return f"messages?$filter={wanted}&$select=id,isDraft,sentDateTime&$top=5"


def seen(reply: Reply) -> Look | str:
    """What one page proves, or the address of the page that is to be read next."""
    answer = reply.answer
    if answer.status != 200:
        outcome = reply.outcome
        barred = isinstance(outcome, Blocked) and outcome.blame is Blame.MAILBOX
        return Forbidden(answer) if barred else Trouble(answer)
    try:
        page = json.loads(reply.content)
        mails, following = page["value"], page.get("@odata.nextLink")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Trouble(answer)
    if not isinstance(mails, list) or not all(isinstance(mail, dict) for mail in mails):
        return Trouble(answer)
    if mails:
        one = next((mail for mail in mails if mail.get("isDraft") is False), mails[0])
        draft = one.get("isDraft") is True
        return Found(answer, _text(one, "id"), _text(one, "sentDateTime"), draft)
    return following if isinstance(following, str) else Absent(answer)


def _text(mail: dict[str, Any], name: str) -> str | None:
    value = mail.get(name)
    return value[:500] if isinstance(value, str) else None
