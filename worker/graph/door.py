"""The door to Graph: what can be asked of it, each one request."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timedelta
from urllib.parse import SplitResult, quote, urlsplit

from worker.graph import looks, reports
from worker.graph.drafts import Drafts
from worker.graph.wire import Wire
from worker.model import Answer, Look, Outcome, Trouble

_JSON = {"Content-Type": "application/json"}


class Graph:
    """The door to Graph for one event loop; connections are shared by all its lanes."""

    def __init__(
        self,
        url: str,
        *,
        ca_bundle: str | None,
        request_timeout: timedelta,
        connections: int = 256,
    ) -> None:
        """`ca_bundle`: a PEM file that alone is trusted, whatever the environment says."""
        self._users = url.rstrip("/") + "/v1.0/users/"
        self._urls: dict[str, str] = {}
        self._wire = Wire(
            url, ca_bundle=ca_bundle, request_timeout=request_timeout, connections=connections
        )
        self.drafts = Drafts(self._wire, self._url)

    async def send(self, mailbox: str, payload: bytes, token: str, *, deadline: float) -> Outcome:
        """Posts `payload` (see `payload`) to the mailbox's sendMail.

        `deadline`: the instant of `time.monotonic()` from which on the request must not leave.
        Nothing that the network does raises; a cancellation passes through and leaves the message
        in doubt.
        """
        url = self._urls.get(mailbox)
        if url is None:
            url = self._urls[mailbox] = self._url(mailbox, "sendMail")
        reply = await self._wire.ask(
            "POST", url, body=payload, token=token, deadline=deadline, headers=_JSON
        )
        return reply.outcome

    async def look(self, mailbox: str, message_id: str, token: str) -> Look:
        """Looks for the message's marker in the whole mailbox. Needs Mail.Read.

        Nothing that the network does raises. Each page is a request of its own with the request
        timeout; a page anywhere but at Graph's own address is not asked for.
        """
        url = self._url(mailbox, looks.search(message_id))
        for _ in range(looks.PAGES):
            reply = await self._wire.ask(
                "GET", url, body=b"", token=token, deadline=math.inf, headers=looks.HEADERS,
                wants=looks.PAGE_BYTES,
            )  # fmt: skip
            found = looks.seen(reply)
            if not isinstance(found, str):
                return found
            if (following := self._own(found)) is None:
                return Trouble(replace(reply.answer, code="ForeignPage"))
            url = following
        return Trouble(replace(reply.answer, code="TooManyPages"))

    async def reports(
        self, mailbox: str, since: datetime, token: str, page: str | None = None
    ) -> reports.Reports:
        """The oldest non-delivery reports in the Inbox that came then or later; one request.

        `page`: the address of a following page. Needs Mail.Read. Nothing that the network does
        raises; a page anywhere but at Graph's own address is not asked for.
        """
        url = self._url(mailbox, reports.search(since)) if page is None else self._own(page)
        if url is None:
            return reports.Reports(Answer(code="ForeignPage"), trouble=True)
        reply = await self._wire.ask(
            "GET", url, body=b"", token=token, deadline=math.inf, headers=reports.HEADERS,
            wants=reports.PAGE_BYTES,
        )  # fmt: skip
        return reports.seen(reply, mailbox)

    async def close(self) -> None:
        """Closes the connections. What is in flight ends as with a lost connection."""
        await self._wire.close()

    def _own(self, page: str) -> str | None:
        """The address of a following page, where it is Graph's own, whatever its path."""
        try:
            ours, theirs = urlsplit(self._users), urlsplit(page)
            same = (ours.scheme, ours.hostname, _port(ours)) == (
                theirs.scheme, theirs.hostname, _port(theirs)
            )  # fmt: skip
        except ValueError:
            return None
        root = ours.path.removesuffix("users/")
        return page if same and theirs.path.startswith(root) and not theirs.username else None

    def _url(self, mailbox: str, path: str) -> str:
        return f"{self._users}{quote(mailbox, safe='')}/{path}"


def _port(address: SplitResult) -> int | None:
    """Raises ValueError where it is no number."""
    return address.port or {"https": 443, "http": 80}.get(address.scheme)
