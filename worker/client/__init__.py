"""The producer's side: `Client.enqueue` and what a producer asks afterwards.

Nothing is appended before everything is checked: the messages are read once, checked, and laid
aside in a private file; only then do they go to the inbox. So a refused call leaves nothing.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Self

from worker import checks, report, runtime, templates
from worker.checks import Call
from worker.client.asking import ask, known_id
from worker.client.control import Control
from worker.client.door import Door, Review, open_template
from worker.client.inside import Inside
from worker.client.keeper import Keeper
from worker.client.lists import Lists
from worker.client.mail import Mails
from worker.client.mailboxes import Mailboxes
from worker.client.planning import Planning
from worker.client.settling import Settling
from worker.client.spool import Spool
from worker.client.through import Through
from worker.config.values import secrets_of
from worker.inbox import Batch
from worker.model import (
    InvalidMessages,
    Message,
    OnUnknown,
    Problem,
    Receipt,
    Template,
    batch_id_of,
)

if TYPE_CHECKING:
    from worker.runtime import Runtime

SPOOL_BYTES = 8 * 1024 * 1024


class Client(Control, Lists, Mailboxes, Mails, Planning, Settling):
    """What an application holds. Safe for threads and forks: it keeps no connection itself."""

    def __init__(self, runtime: Callable[[], Runtime]) -> None:
        self._runtime = runtime

    @classmethod
    def from_env(cls) -> Self:
        """A client with the settings of the environment. Raises InvalidSettings."""
        runtime.current()
        return cls(runtime.current)

    def enqueue(  # noqa: PLR0913  (the contract's arguments)
        self,
        messages: Iterable[Message | Mapping[str, Any] | Problem] | Message,
        *,
        sender: str | None = None,
        pool: str | None = None,
        name: str | None = None,
        template: Template | Mapping[str, Any] | None = None,
        priority: str = "normal",
        send_at: datetime | str | None = None,
        expires_at: datetime | str | None = None,
        idempotency_key: str | None = None,
        on_invalid: Literal["raise", "skip"] = "raise",
        on_finished: str | None = None,
        max_failures: int | str | None = None,
        ignore_suppressions: bool = False,
        by: str = "api",
        session: Any = None,
    ) -> Receipt:  # fmt: skip
        """Checks all messages, then appends them as one batch; a repeat with its key adds nothing.

        `session`: a SQLAlchemy Session or Connection on Postroom's database. The messages are rows
        of its transaction: rolled back, there is nothing; committed, they are sent. Redis is not
        needed. What the database refuses there is raised as it is.

        `ignore_suppressions`: for legal notices; an event says so, and `by` whom.
        `on_finished`: the name of a Celery task of the application's own, called with the batch's
        id and its counts when it has finished, at least once.
        A Problem among the messages stands for a row that its reader could not read.
        `max_failures`: so many rejections in a row pause the batch, instead of MAX_FAILURES.
        Raises InvalidMessages, IdempotencyConflict, InboxFull, Unavailable.
        """
        rt = self._runtime()
        given = {"sender": sender, "pool": pool, "name": name, "priority": priority,
                 "send_at": send_at, "expires_at": expires_at, "on_invalid": on_invalid,
                 "on_finished": on_finished, "max_failures": max_failures,
                 "ignore_suppressions": ignore_suppressions, "by": by}  # fmt: skip
        batch_id, wrong = _batch_id(idempotency_key)
        way = _way(rt, session, batch_id, repeat=idempotency_key is not None)
        now = way.now()
        with _file() as file, _keeper(rt) as keeper:
            door, more = _door(rt, way, given, template, now, keeper)
            spool = Spool(file, door.identity())
            rejected = _let_in(door, messages, spool, [*wrong, *more], skip=on_invalid == "skip")
            if not spool.messages:
                return Receipt(batch_id, 0, 0, rejected)
            batch = Batch(batch_id, spool.digest.hexdigest(), door.head(now), spool.chunks,
                          spool.messages)  # fmt: skip
            accepted, duplicates = way.append(batch, spool, keeper)
        return Receipt(batch_id, accepted, duplicates, rejected)

    def preview(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        *,
        template: Template | Mapping[str, Any] | None = None,
        count: int = 3,
    ) -> list[templates.Rendered]:
        """The first `count` messages as they would be sent; all are checked, nothing is sent.

        Raises InvalidMessages, Unavailable.
        """
        found = self.review(messages, template=template, count=count)
        if found.problems:
            raise InvalidMessages(found.problems)
        return found.first

    def review(
        self,
        messages: Iterable[Message | Mapping[str, Any] | Problem] | Message,
        *,
        template: Template | Mapping[str, Any] | None = None,
        count: int = 3,
    ) -> Review:
        """As `preview`, but gives the problems, and how many rows there were."""
        rt = self._runtime()
        with _keeper(rt) as keeper:
            rules = _rules(rt, keeper, template)
            source, compiled, wrong = open_template(template, rules.secrets)
            if wrong:
                return Review(problems=wrong)
            return Door(Call(), source, compiled, rules).review(messages, count)

    def status(self, batch_id: str) -> dict[str, Any]:
        """State and counts of a batch; what still lies in the inbox counts as queued.

        Raises NotFound, Unavailable.
        """
        rt, batch_id = self._runtime(), known_id(batch_id)
        found: dict[str, Any] = ask(rt, lambda: report.status(rt, batch_id))
        return found

    def messages(self, batch_id: str) -> Iterator[dict[str, Any]]:
        """Every message of a batch in the order of its input, streamed. Raises NotFound."""
        rt, batch_id = self._runtime(), known_id(batch_id)
        ask(rt, lambda: report.status(rt, batch_id))  # raises NotFound
        return iter(rt.store.export(batch_id))


def _way(rt: Runtime, session: object, batch_id: str, *, repeat: bool) -> Inside | Through:
    if session is None:
        return Through(rt, batch_id, repeat=repeat)
    return Inside(rt, session, batch_id)


def _file() -> Any:
    """A private file, in memory while it is small."""
    return tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)


@contextmanager
def _keeper(rt: Runtime) -> Iterator[Keeper]:
    with _file() as contents:
        yield Keeper(contents, rt.settings.attachment_root)


def _door(
    rt: Runtime, way: Inside | Through, given: Mapping[str, Any], template: object, now: datetime,
    keeper: Keeper,
) -> tuple[Door, list[Problem]]:  # fmt: skip
    """The door for one call, and what is wrong with the call itself."""
    call, problems = checks.check_call(given, now=now, known_pool=way.knows_pool)
    rules = _rules(rt, keeper, template)
    source, compiled, wrong = open_template(template, rules.secrets)
    door = Door(call, source, compiled, rules, keeper, str(given["by"]))
    return door, [*problems, *wrong]


def _rules(rt: Runtime, keeper: Keeper, template: object) -> checks.Rules:
    settings = rt.settings
    return checks.Rules(
        template=template is not None,
        needs_sent_copy=settings.on_unknown is OnUnknown.RECONCILE,
        keep=keeper.take, allowed_domains=settings.allowed_domains, secrets=secrets_of(settings),
    )  # fmt: skip


def _let_in(
    door: Door, messages: Any, spool: Spool, wrong: list[Problem], *, skip: bool
) -> tuple[Problem, ...]:
    """Lays the good rows into the spool; gives what is wrong with those that are skipped.

    Raises InvalidMessages with all that is wrong with the call and with its rows.
    """
    try:
        rejected = door.pass_through(messages, spool, every=not wrong and skip)
    except InvalidMessages as error:
        raise InvalidMessages([*wrong, *error.problems]) from None
    if wrong or (rejected and not skip):
        raise InvalidMessages([*wrong, *rejected])
    return tuple(rejected)


def _batch_id(key: str | None) -> tuple[str, list[Problem]]:
    """The id that belongs to a key, and what is wrong with the key."""
    problems = [] if key is None else checks.check_key(key)
    return (str(uuid.uuid4()) if key is None or problems else batch_id_of(key)), problems
