"""The words of Postroom: values, states, transitions and errors. Pure: no I/O, no clock, no chance.

PostroomError
├── InvalidMessages      what was to be enqueued is wrong: `.problems` says row, code, path, detail
├── InvalidSettings      a setting is absent or wrong
├── IdempotencyConflict  the key was used before with other content
├── InboxFull            the inbox has no room: nothing of this chunk was kept
├── Unavailable          Redis or the database does not answer: repeat with `.batch_id`
├── NotFound             no such batch, message, mailbox or pool
└── WrongState           the batch or message is in a state that forbids this
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any

MARKER_NAME = "PostroomId"
MARKER_HEADER = "x-postroom-id"

#: Message ids are made from batch id and position, batch ids from the idempotency key, so that
#: a repeated call names the same rows.
NAMESPACE = uuid.UUID("6f0b1f0e-5b0c-5a54-9d0e-0a3d2f1c7b66")


class State(StrEnum):
    """Where a message is. Every message is in exactly one state until it is purged."""

    QUEUED = "queued"  #: waiting; `due_at` says until when at least
    SENDING = "sending"  #: claimed by a worker, under a lease
    SENT = "sent"  #: Graph answered 202; it promises no more
    FAILED = "failed"  #: refused for good, and surely not sent
    UNKNOWN = "unknown"  #: may have been sent; settled by a look, a person or a resend
    CANCELLED = "cancelled"  #: taken back before it was sent
    EXPIRED = "expired"  #: its deadline passed before it was sent
    SUPPRESSED = "suppressed"  #: its recipient is not to be written to


#: The legal transitions, with those that README.md's drawing leaves out. The store's guards hold
#: them, and tests explore them.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset(
        {State.SENDING, State.CANCELLED, State.EXPIRED, State.SUPPRESSED, State.UNKNOWN, State.SENT}
    ),
    State.SENDING: frozenset(
        {State.SENT, State.QUEUED, State.FAILED, State.UNKNOWN, State.CANCELLED}
    ),
    State.UNKNOWN: frozenset({State.SENT, State.QUEUED, State.FAILED, State.CANCELLED}),
    State.FAILED: frozenset({State.QUEUED, State.SENT}),
    State.SENT: frozenset(),
    State.CANCELLED: frozenset({State.SENT}),
    State.EXPIRED: frozenset({State.SENT}),
    State.SUPPRESSED: frozenset({State.SENT}),
}


class BatchState(StrEnum):
    """What a batch is doing, computed from its four times."""

    OPEN = "open"  #: not all of it has arrived; nothing of it is sent
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    FINISHED = "finished"  #: nothing is queued or sending


class Priority(IntEnum):
    """Smaller goes first."""

    HIGH = 0
    NORMAL = 1
    BULK = 2

    @classmethod
    def named(cls, name: str) -> Priority:
        """The priority called `name` (high, normal, bulk). Raises ValueError."""
        try:
            return cls[name.upper()]
        except KeyError:
            raise ValueError(f"priority {name!r} is not one of high, normal, bulk") from None


class OnUnknown(StrEnum):
    """What becomes of a message in doubt."""

    HOLD = "hold"  #: it stays unknown until someone settles it
    RECONCILE = "reconcile"  #: absent from the mailbox once nothing can come any more: queued again
    RESEND = "resend"  #: queued again at once: a second copy is possible, and said on the audit


def batch_id_of(key: str) -> str:
    """The batch id that belongs to an idempotency key; a key that is a UUID is itself the id."""
    try:
        return str(uuid.UUID(key))
    except ValueError:
        return str(uuid.uuid5(NAMESPACE, key))


def message_id_of(batch_id: str, position: int) -> str:
    """The id of the message at input row `position` (from 1) of a batch."""
    return str(uuid.uuid5(uuid.UUID(batch_id), str(position)))


# ---- what applications give ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file sent along: `content` in bytes, or `path`, a file below POSTROOM_ATTACHMENT_ROOT.

    `content_type`: without one, it follows from the name. `content_id` makes it an inline image,
    to which the HTML refers as `cid:...`.
    """

    name: str
    content: bytes | None = None
    content_type: str | None = None
    content_id: str | None = None
    path: str | Path | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the content of attachments: number `number` (from 0), PART bytes or the rest."""

    sha256: str  #: of the whole content
    size: int  #: of the whole content, in bytes
    number: int
    content: bytes


#: Bytes of a part: few enough for one call to Redis, and a whole number of the 320 KiB that
#: Graph's upload sessions count in.
PART = 4 * 320 * 1024


def parts_of(size: int) -> int:
    """How many parts a content of `size` bytes has."""
    return max(1, -(-size // PART))


@dataclass(frozen=True, slots=True)
class Template:
    """Subject and bodies in Jinja2, filled with each message's variables."""

    subject: str
    html: str | None = None
    text: str | None = None


Recipients = str | tuple[str, str] | Mapping[str, str] | Sequence[Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One mail to one set of recipients.

    A recipient is an address, or a pair (name, address), or a mapping with `address` and `name`;
    `to`, `cc`, `bcc` and `reply_to` take one or a list. Graph takes one body: where `html` is
    given, `text` is not sent, and Exchange makes the text part from the HTML. Nothing is checked
    here: `Client.enqueue` checks all messages of a call together and names every problem by its
    row.
    """

    to: Recipients
    subject: str | None = None
    html: str | None = None
    text: str | None = None
    cc: Recipients = ()
    bcc: Recipients = ()
    reply_to: Recipients = ()
    from_: Recipients | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    attachments: Sequence[Attachment] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    list_unsubscribe: str | None = None
    importance: str | None = None
    save_to_sent_items: bool = True
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one row: place, reason, and what is allowed."""

    row: int
    code: str
    path: str
    detail: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.path}: {self.detail} ({self.code})"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `enqueue` took: accepted + duplicates + len(rejected) is the number of rows."""

    batch_id: str
    accepted: int
    duplicates: int
    rejected: tuple[Problem, ...] = ()


# ---- what a lane works with ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Due:
    """A message that may be sent now, as seen before it is claimed. `content` is immutable."""

    id: str
    batch_id: str
    queue_id: str
    content: Mapping[str, Any]
    recipients: int  #: how many addresses it counts as
    tries: int
    doubt: bool
    fence: int
    #: In lower case; none of them may be suppressed at the claim. Empty where that is ignored.
    addresses: Sequence[str] = ()
    left_out: Sequence[str] = ()  #: places of suppressed recipients, which `content` lacks


# ---- what the outside said ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What is kept of one exchange with Graph, for the audit and for the verdict."""

    status: int | None = None  #: None where no status line came
    code: str | None = None  #: the most specific known `error.code`, or ours (ConnectError, ...)
    detail: str | None = None  #: for people; at most 300 characters, no address, no body, no token
    request_id: str | None = None
    client_request_id: str | None = None
    retry_after: timedelta | None = None  #: None where absent or nonsense
    duration: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class Accepted:
    """202. Sent, whatever follows it; a Retry-After only cools the mailbox down."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Throttled:
    """429 or the like: surely not sent, the mailbox must rest."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Rejected:
    """The message itself is refused and surely not sent; `passing`: a repeat may help."""

    answer: Answer
    passing: bool = False


class Blame(StrEnum):
    """Whose configuration refused: what rests until it is mended."""

    TOKEN = "token"  # noqa: S105  (401: the token is refused, and all lanes use it)
    MAILBOX = "mailbox"  # 403, 404: this mailbox may not be used


@dataclass(frozen=True, slots=True)
class Blocked:
    """Refused through no fault of the message: configuration of mailbox or credential."""

    answer: Answer
    blame: Blame


@dataclass(frozen=True, slots=True)
class NotSent:
    """No connection was made, or our own guard refused: nothing left this process."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Unknown:
    """Anything after the connection without a clear word: it may have been sent."""

    answer: Answer


Outcome = Accepted | Throttled | Rejected | Blocked | NotSent | Unknown


@dataclass(frozen=True, slots=True)
class Verdict:
    """What we do about an outcome: the next state, when, and whether a try is spent."""

    state: State
    delay: timedelta = timedelta(0)  #: for `queued`: due after this; none: it keeps its place
    spends_try: bool = False
    doubt: bool = False  #: the message is in doubt from now on
    cooldown: timedelta | None = None  #: the mailbox rests for this long


# ---- what a look into a mailbox said -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """The message lies in the mailbox. Id and time are Graph's, where it gave them.

    `draft`: as a draft only. It was sent even so, unless it was made as a draft before it was sent.
    """

    answer: Answer
    graph_id: str | None = None
    sent_at: str | None = None
    draft: bool = False


@dataclass(frozen=True, slots=True)
class Absent:
    """The whole mailbox was searched, and the message is not there now; `draft`: but its draft."""

    answer: Answer
    draft: bool = False


@dataclass(frozen=True, slots=True)
class Forbidden:
    """This mailbox may not be read, or is not there: 403, 404."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Trouble:
    """The look itself went wrong, and says nothing."""

    answer: Answer


Look = Found | Absent | Forbidden | Trouble


class PostroomError(Exception):
    """The root of all errors that Postroom raises on purpose."""


class InvalidSettings(PostroomError):
    """A setting is absent or wrong; the text names each one and what is allowed."""


class InvalidMessages(PostroomError):
    """What was to be enqueued is wrong; nothing of it was kept."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        shown = "; ".join(str(p) for p in self.problems[:3])
        more = f"; and {len(self.problems) - 3} more" if len(self.problems) > 3 else ""
        super().__init__(f"{len(self.problems)} problem(s): {shown}{more}")


class IdempotencyConflict(PostroomError):
    """This key was used before with other content; the first content stands."""

    def __init__(self, batch_id: str) -> None:
        self.batch_id = batch_id
        super().__init__(f"the idempotency key of batch {batch_id} was used with other content")


class InboxFull(PostroomError):
    """The inbox has no room. What was kept of the batch stays open: repeat with its id as key."""

    def __init__(self, batch_id: str) -> None:
        self.batch_id = batch_id
        super().__init__(
            f"the inbox is full; repeat later with idempotency_key={batch_id!r}: nothing is doubled"
        )


class Unavailable(PostroomError):
    """Redis or the database does not answer. `batch_id`, where set, is the key to repeat with."""

    def __init__(self, what: str, batch_id: str | None = None) -> None:
        self.batch_id = batch_id
        again = (
            f"; repeat with idempotency_key={batch_id!r}: nothing is doubled" if batch_id else ""
        )
        super().__init__(f"{what}{again}")


class NotFound(PostroomError):
    """No such batch, message, mailbox or pool."""


class WrongState(PostroomError):
    """The batch or message is in a state that forbids this."""
