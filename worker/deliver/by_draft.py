"""Sends a claimed message that is too large for one request: by a draft and upload sessions.

https://learn.microsoft.com/graph/outlook-large-attachments

One claim does as much of it as its lease allows; then the message returns to its queue, and
keeps its place there. What was reached lies in SQL: the draft's id is committed before anything
is added to the draft, the address of an upload session before the first byte goes there. Nothing
but the last request sends a mail: only from then on can there be doubt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from worker.checks import IN_REQUEST
from worker.deliver.values import Deps, Prepared
from worker.deliver.visits import Visits, is_final, is_over, may_draft, went_wrong
from worker.graph import Reply, as_json, file_attachment, message_of
from worker.graph.drafts import document, next_start, safe_url, text_of, values
from worker.limits import Limits
from worker.model import (
    PART,
    Accepted,
    Answer,
    Blame,
    Blocked,
    NotSent,
    Outcome,
    Rejected,
    Throttled,
)
from worker.policy import (
    CONTENT_MISSING,
    HELD_BACK,
    LEASE_NEARLY_OVER,
    NEEDS_READ_WRITE,
    UPLOADING,
    classify,
)
from worker.tokens import Token

#: Bytes of a range: below 4 MB, and a whole number of 320 KiB.
RANGE = 3 * PART
#: So often a broken upload is taken up again before the message rests.
MOST_BREAKS = 3
#: A content that has not arrived is looked for again after so long: a worker may be writing it.
ARRIVAL = timedelta(seconds=15)

_ITEM_NOT_FOUND = "ErrorItemNotFound"


@dataclass(slots=True)
class ByDraft:
    """One claim's part of the way."""

    deps: Deps
    mailbox: str
    prepared: Prepared
    fence: int
    token: Token
    deadline: float  #: monotonic: from then on no request must leave
    limits: Limits  #: the mailbox's
    draft_id: str | None = None
    upload_url: str | None = None
    found: bool = False  # the draft was there before this claim, or something broke since
    uploaded: int = 0  # bytes, for people

    async def run(self) -> Outcome:
        """What came of it. Raises SQLAlchemyError where SQL does not answer: nothing was sent."""
        outcome = await self._run()
        if isinstance(outcome, NotSent) and outcome.answer.code == UPLOADING:
            outcome = self._later(outcome.answer.detail or "", outcome.answer.retry_after)
        if isinstance(outcome, Blocked) and outcome.blame is Blame.MAILBOX:
            # Another mailbox of the pool may be allowed what this one is not.
            await asyncio.to_thread(self.deps.store.drafts.forget, self._id)
        return outcome

    async def _run(self) -> Outcome:
        begin = self.deps.store.drafts.begin
        known = await asyncio.to_thread(begin, self._id, self.fence, self.mailbox)
        if known is None:
            return _lost()
        self.draft_id, self.upload_url = known.draft_id, known.upload_url
        for step in (self._find, self._create, self._fill, self._check):
            if (ended := await step()) is not None:
                return ended
        return await self._send()

    # ---- the draft -----------------------------------------------------------------------------

    async def _find(self) -> Outcome | None:
        """The draft of an earlier claim, which may not have told of it; or the mail itself."""
        if self.draft_id is None:
            return await self._search() if self.fence > 1 else None
        reply = await self._ask(self._drafts.look, self.mailbox, self.draft_id)
        if reply.answer.code == _ITEM_NOT_FOUND:  # deleted, or sent under another id
            return await self._note(draft_id=None) or await self._search()
        if (failed := went_wrong(reply)) is not None:
            return failed
        self.found = True
        is_draft = document(reply).get("isDraft")
        if not isinstance(is_draft, bool):  # cut, or not Graph's: it proves nothing
            return NotSent(replace(reply.answer, detail="whether the draft was sent did not come"))
        return None if is_draft else Accepted(reply.answer)

    async def _search(self) -> Outcome | None:
        reply = await self._ask(self._drafts.find, self.mailbox, self._id)
        failed = went_wrong(reply)
        if isinstance(failed, Throttled) or (
            isinstance(failed, Blocked) and failed.blame is Blame.TOKEN
        ):
            return failed
        # Without an answer, and where the mailbox may not be read, a draft may be left over.
        for mail in values(reply) or () if failed is None else ():
            if mail.get("isDraft") is False:
                return Accepted(reply.answer)
            if isinstance(draft_id := mail.get("id"), str):
                self.found = True
                return await self._note(draft_id=draft_id)
        return None

    async def _create(self) -> Outcome | None:
        if self.draft_id is not None:
            return None
        due, shown = self.prepared.due, self.prepared.shown
        assert shown is not None  # noqa: S101  (what has no problem was rendered)
        if not due.content.get("save_to_sent_items", True):
            detail = "it goes by a draft, which Graph always keeps in Sent Items"
            return Rejected(Answer(code="SAVE_DRAFT", detail=detail))
        message = as_json(message_of(due.content, message_id=due.id, **asdict(shown)))
        reply = await self._ask(self._drafts.create, self.mailbox, message)
        if reply.answer.status == 403 and not may_draft(self.token.value):
            return Rejected(_needs_read_write(reply.answer))
        if (failed := went_wrong(reply)) is not None:
            return failed
        draft_id = text_of(reply, "id")
        if draft_id is None:
            return NotSent(replace(reply.answer, detail="the draft came without an id"))
        return await self._note(draft_id=draft_id)

    async def _check(self) -> Outcome | None:
        """Where something broke, the draft is sent only if it holds what it should."""
        if not self.found:
            return None
        count, failed = await self._count()
        if failed is not None or count == len(self._references):
            return failed
        reply = await self._ask(self._drafts.delete, self.mailbox, str(self.draft_id))
        if reply.answer.code != _ITEM_NOT_FOUND and (failed := went_wrong(reply)) is not None:
            return failed
        ended = await self._note(draft_id=None)
        return ended or self._later("the draft held other attachments; it is made anew")

    async def _send(self) -> Outcome:
        lease = self.deps.rules.lease.total_seconds()
        release = self.deps.store.drafts.release
        if not await asyncio.to_thread(release, self._id, self.fence, lease):
            return _lost()
        # The claim's own slot is this request's: no visit beside it.
        if self._visits.over():
            return self._later()
        reply: Reply = await self._drafts.send(self.mailbox, str(self.draft_id), *self._leave)
        if reply.answer.status is None:
            return reply.outcome
        return classify(reply.answer, of_draft=True)

    # ---- its attachments -----------------------------------------------------------------------

    async def _fill(self) -> Outcome | None:
        """Adds what is missing, in order: so many as are there are the first ones."""
        count = 0
        if self.found:
            count, failed = await self._count()
            if failed is not None:
                return failed
        for number, reference in enumerate(self._references[count:], start=count):
            self.uploaded = sum(one["size"] for one in self._references[:number])
            add = self._attach if reference["size"] <= IN_REQUEST else self._upload
            if (ended := await add(reference, number)) is not None:
                return ended
        return None

    async def _count(self) -> tuple[int, Outcome | None]:
        """How many attachments the draft holds."""
        reply = await self._ask(self._drafts.attachments, self.mailbox, str(self.draft_id))
        if (failed := went_wrong(reply)) is not None:
            return 0, failed
        there = values(reply)
        if there is None:
            return 0, NotSent(replace(reply.answer, detail="the attachments could not be counted"))
        return len(there), None

    async def _attach(self, reference: Mapping[str, Any], _number: int) -> Outcome | None:
        whole = self.deps.store.contents.whole
        content = await asyncio.to_thread(whole, reference["sha256"], reference["size"])
        if content is None:
            return content_missing()
        attachment = file_attachment(reference, content)
        return went_wrong(
            await self._ask(self._drafts.attach, self.mailbox, str(self.draft_id), attachment)
        )

    async def _upload(self, reference: Mapping[str, Any], number: int) -> Outcome | None:
        """Range after range, from where it broke; gives up when it breaks too often."""
        start: int | None = None  # not known: the session is asked
        for _ in range(MOST_BREAKS + 1):
            if start is None and self.upload_url is not None:
                start, failed = await self._status()
                if failed is not None:
                    return failed
            if self.upload_url is None:
                done, failed = await self._open(reference, number)
                if done or failed is not None:
                    return failed
                start = 0
            ended, start = await self._ranges(reference, start or 0)
            if ended is not None or start == reference["size"]:
                return ended
            self.found, start = True, None
        return self._later("the upload broke off again and again", timedelta(seconds=10))

    async def _open(self, reference: Mapping[str, Any], number: int) -> tuple[bool, Outcome | None]:
        """Opens a session, unless the last one had ended with the attachment in its place."""
        if self.found:
            count, failed = await self._count()
            if failed is not None or count > number:
                return count > number, failed
        reply = await self._ask(
            self._drafts.open_session, self.mailbox, str(self.draft_id), reference
        )
        if (failed := went_wrong(reply)) is not None:
            return False, failed
        url = text_of(reply, "uploadUrl")
        if url is None or not safe_url(url):
            return False, NotSent(replace(reply.answer, detail="no address to upload to came"))
        return False, await self._note(draft_id=self.draft_id, upload_url=url)

    async def _status(self) -> tuple[int | None, Outcome | None]:
        """Where an upload session goes on; None, and no session any more, where it is over."""
        reply = await self._visits.ask(
            0, lambda: self._drafts.upload_status(str(self.upload_url), self.deadline)
        )
        if reply.answer.status == 200 and (start := next_start(reply)) is not None:
            return start, None
        if is_over(reply):
            self.found = True
            return None, await self._note(draft_id=self.draft_id)
        return None, went_wrong(reply) or NotSent(reply.answer)

    async def _ranges(
        self, reference: Mapping[str, Any], start: int
    ) -> tuple[Outcome | None, int | None]:
        """Uploads until the end, which is given, or until it breaks: None."""
        size, read = reference["size"], self.deps.store.contents.read
        before = self.uploaded
        while start < size:
            self.uploaded = before + start
            content = await asyncio.to_thread(read, reference["sha256"], start, RANGE)
            if len(content) != min(RANGE, size - start):
                return content_missing(), None
            reply = await self._put(content, start, size)
            if isinstance(reply.outcome, Throttled) or reply.answer.code in HELD_BACK:
                return reply.outcome, None
            if is_final(reply):
                return reply.outcome, None
            if reply.answer.status not in {200, 201, 202}:
                return (went_wrong(reply) if reply.answer.retry_after else None), None
            if reply.answer.status == 201:
                break
            start = next_start(reply) or start + len(content)
            # Only 201 says that the attachment is there: after anything else they are counted.
            self.found |= start >= size
        return await self._note(draft_id=self.draft_id), size

    # ---- requests ------------------------------------------------------------------------------

    async def _ask(self, request: Callable[..., Awaitable[Reply]], *what: Any) -> Reply:
        """Asks Graph, in a visit."""
        size = sum(len(one) for one in what if isinstance(one, bytes))
        size += sum(len(one.get("contentBytes", "")) for one in what if isinstance(one, dict))
        return await self._visits.ask(size, lambda: request(*what, *self._leave))

    async def _put(self, content: bytes, start: int, size: int) -> Reply:
        url = str(self.upload_url)
        return await self._visits.ask(
            len(content), lambda: self._drafts.upload(url, content, start, size, self.deadline)
        )

    def _later(self, why: str = "", wait: timedelta | None = timedelta(0)) -> NotSent:
        total = sum(one["size"] for one in self._references)
        detail = why or f"{self.uploaded / 1e6:.1f} of {total / 1e6:.1f} MB are uploaded"
        return NotSent(Answer(code=UPLOADING, detail=detail, retry_after=wait))

    async def _note(self, *, draft_id: str | None, upload_url: str | None = None) -> Outcome | None:
        """Commits how far it is; ends where the claim is lost."""
        self.draft_id, self.upload_url = draft_id, upload_url

        def keep() -> bool:
            return self.deps.store.drafts.keep(
                self._id, self.fence, draft_id=draft_id, upload_url=upload_url
            )

        return None if await asyncio.to_thread(keep) else _lost()

    @property
    def _visits(self) -> Visits:
        return Visits(self.deps, self.mailbox, self._id, self.deadline, self.limits)

    @property
    def _leave(self) -> tuple[str, float]:
        return self.token.value, self.deadline

    @property
    def _id(self) -> str:
        return self.prepared.due.id

    @property
    def _references(self) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = self.prepared.due.content.get("attachments", ())
        return found

    @property
    def _drafts(self) -> Any:
        return self.deps.graph.drafts


def content_missing() -> NotSent:
    """The message waits, and no try is spent."""
    detail = "an attachment's content is not in the database yet, or cannot be read from it"
    return NotSent(Answer(code=CONTENT_MISSING, detail=detail, retry_after=ARRIVAL))


def _lost() -> NotSent:
    detail = "the claim ended before the draft was sent"
    return NotSent(Answer(code=LEASE_NEARLY_OVER, detail=detail))


def _needs_read_write(answer: Answer) -> Answer:
    detail = f"attachments above 3 MB need the permission Mail.ReadWrite: {answer.detail or 403}"
    return replace(answer, code=NEEDS_READ_WRITE, detail=detail[:300])
