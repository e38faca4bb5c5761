"""A state machine over the real store: anything in any order, against a reference model.

After each step every row is what the model says it is, and no promise is broken: I1 to I8 and I12
of the catalogue that the model's and the rules' docstrings name.
"""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event, select

from tests.reference import LEASE, LIFE, MAX_ATTEMPTS, REST, TOKEN, WAIT, Parcel, Reference
from tests.store_kit import Kit, answer, chunk, opened, to_record
from worker.model import (
    TRANSITIONS,
    Accepted,
    Blame,
    Blocked,
    NotSent,
    OnUnknown,
    Outcome,
    Rejected,
    State,
    Throttled,
    Unknown,
    WrongState,
    message_id_of,
)
from worker.policy import conclude
from worker.store import Head
from worker.store.doubt import Looked
from worker.store.schema import attempts, messages, metadata, queues

PHASES = (Phase.generate,)
NOT_SENT = {State.FAILED, State.CANCELLED, State.EXPIRED}


@dataclass(slots=True)
class Flight:
    """A claim on its way: what its worker saw, whether it was posted, what it heard."""

    head: Head
    one: str
    fence: int
    tries: int
    doubt: bool
    token_ends: float
    outcome: Outcome | None = None
    ours: bool | None = None  # what its first record was answered


#: What may happen to a request: whether Graph accepts the mail, and what the worker hears.
FATES: dict[str, tuple[bool, Any]] = {
    "202": (True, lambda: Accepted(answer(status=202))),
    "504 after accepting": (True, lambda: Unknown(answer(status=504))),
    "503": (False, lambda: Unknown(answer(status=503))),
    "reset after accepting": (True, lambda: Unknown(answer(code="ClientOSError"))),
    "reset": (False, lambda: Unknown(answer(code="ClientOSError"))),
    "429": (False, lambda: Throttled(answer(status=429))),
    "400": (False, lambda: Rejected(answer(status=400))),
    "409": (False, lambda: Rejected(answer(status=409), passing=True)),
    "403": (False, lambda: Blocked(answer(status=403), Blame.MAILBOX)),
    "no connection": (False, lambda: NotSent(answer(code="ConnectError"))),
}


#: What happens how often.
STEPS = [
    *["enqueue"] * 4, "arrive", *["claim"] * 5, *["work"] * 2, "post", *["record"] * 6,
    *["time passes"] * 5, *["look"] * 3,
    *["zombie"] * 2, "pause", *["resume"] * 2, *["retry"] * 2, "cancel",
]  # fmt: skip
FATE = ["202", "202", "504 after accepting", *FATES]


class Machine(RuleBasedStateMachine):
    """One example: batches, workers, operators, crashes, and time that passes."""

    kit: ClassVar[Kit]  # set by the test, one database for all examples

    @initialize(policy=st.sampled_from(OnUnknown))
    def begin(self, policy: OnUnknown) -> None:
        with self.kit.engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
        self.model = Reference(policy)
        self.heads: dict[str, Head] = {}
        self.copies: Counter[str] = Counter()  # what Graph accepted
        self.allowed: Counter[str] = Counter()  # copies more than one that somebody chose
        self.before: dict[str, State] = {}
        self.flights: list[Flight] = []

    # ---- the way in ----------------------------------------------------------------------------

    @rule(seed=st.integers(0, 2**32 - 1))
    def step(self, seed: int) -> None:
        """One of the things that may happen, to one of those it can happen to. A rule for each
        would leave most of an example to a few of them; this way their shares are known.
        """
        chance = random.Random(seed)
        what, pick, fate = chance.choice(STEPS), chance.randrange(8), chance.choice(FATE)
        if not self.heads or what == "enqueue":
            self._enqueue(1 + pick % 2, second=pick > 5)
        elif what in {"post", "record"}:
            if self.flights:
                flight = self.flights[-1 - pick % len(self.flights)]
                (self._post if what == "post" else self._record)(flight, fate)
        elif what == "time passes":
            self._pass(60 if pick == 0 else 3)
            if pick < 6:
                self._sweep()
        elif what == "look":
            self._look()
        else:
            self._touch(what, list(self.heads)[-1 - pick % min(3, len(self.heads))], pick, fate)

    def _touch(self, what: str, batch: str, pick: int, fate: str) -> None:
        """What happens to a batch."""
        match what:
            case "arrive":
                self._arrive_again(batch, 1 + pick % 2, other=pick > 3)
            case "pause" | "resume":
                self._pause(batch, resume=what == "resume")
            case "retry":
                self._retry(batch, include_unknown=pick > 3)
            case "cancel":
                self._cancel(batch)
            case _:
                started = self._claim(batch)
                self.flights += started
                if what == "zombie":  # its claims run out, another takes over, and it wakes
                    self._pass(3)
                    self._sweep()
                    self.flights += self._claim(batch)
                for one in started if what != "claim" else ():
                    self._record(one, fate)

    def _enqueue(self, first: int, *, second: bool) -> None:
        """A batch of one chunk, or of two of which only the first has arrived."""
        head = replace(
            self.kit.head(first + second, chunks=2 if second else 1, id=str(uuid.uuid4())),
            deadline_at=self.kit.head(1).due_at + timedelta(hours=1, seconds=LIFE),
        )
        self.heads[head.id] = head
        self.model.batches[head.id] = Parcel(2 if second else 1)
        self._arrive(head.id, 1)

    def _arrive_again(self, batch: str, number: int, *, other: bool) -> None:
        """A chunk that is missing, or one that came before, perhaps with other content: it changes
        nothing (I12).
        """
        head = self.heads[batch]
        if number not in self.model.batches[batch].arrived:
            self._arrive(batch, min(number, head.chunks))
        elif other:
            changed = chunk(head, number, range(50, 60), digest="f" * 64)
            self.kit.store.arrive([head], [changed])
        else:
            self._arrive(batch, number)

    def _arrive(self, batch: str, number: int) -> None:
        head = self.heads[batch]
        first = range(1, head.total + 1) if head.chunks == 1 else range(1, head.total)
        positions = first if number == 1 else range(head.total, head.total + 1)
        fresh = replace(
            head,
            due_at=head.due_at,
            deadline_at=self.kit.head(1).due_at + timedelta(hours=1, seconds=LIFE),
        )
        self.kit.store.arrive([fresh], [chunk(fresh, number, positions)])
        self.model.arrive(batch, number, [message_id_of(batch, n) for n in positions])

    # ---- workers -------------------------------------------------------------------------------

    def _claim(self, batch: str) -> list[Flight]:
        """Some worker asks for the messages of a batch, whatever their state. What becomes of a
        flight that is never picked again: its process has died.
        """
        known = [one for one, mail in self.model.mails.items() if mail.batch == batch]
        before = {one: (self.model.mails[one].tries, self.model.mails[one].doubt) for one in known}
        expected = self.model.claim(known)
        claimed = self.kit.claim(known, lease=LEASE, token_left=TOKEN) if known else {}
        assert claimed == expected
        head, ends = self.heads[batch], self.model.now + TOKEN
        return [Flight(head, one, fence, *before[one], ends) for one, fence in claimed.items()]

    def _post(self, flight: Flight, fate: str) -> None:
        """Graph decides, perhaps long after the lease, but never after the token has ended (I7:
        there is a committed claim with this fence).
        """
        if flight.outcome is not None:
            return
        [row] = self.kit.sql("SELECT fence FROM messages WHERE id = :id", id=flight.one)
        assert row.fence >= flight.fence
        if self.model.now >= flight.token_ends:
            flight.outcome = Blocked(answer(status=401), Blame.TOKEN)
            return
        accepted, outcome = FATES[fate]
        flight.outcome = outcome()
        self.copies[flight.one] += accepted

    def _record(self, flight: Flight, fate: str) -> None:
        """What came of it is written, however late; perhaps again, because the answer to a COMMIT
        was lost.
        """
        self._post(flight, fate)
        assert flight.outcome is not None
        verdict = conclude(
            flight.outcome, tries=flight.tries, doubt=flight.doubt, max_attempts=MAX_ATTEMPTS,
            on_unknown=self.model.policy, jitter=0.5,
        )  # fmt: skip
        if verdict.state is State.QUEUED:
            verdict = replace(verdict, delay=timedelta(seconds=REST))
        if flight.ours is None:
            resent = verdict.state is State.QUEUED and verdict.doubt
            self.allowed[flight.one] += resent
            flight.ours = self.model.record(flight.one, flight.fence, verdict)
            if isinstance(flight.outcome, Unknown):
                self.model.mails[flight.one].doubtful.append(flight.token_ends)
        result = replace(
            to_record(flight.head, flight.one, flight.fence, verdict, flight.outcome),
            token_left=flight.token_ends - self.model.now,
        )
        expected = {(flight.one, flight.fence)} if flight.ours else set()
        assert self.kit.record(result) == expected

    # ---- time and chores -----------------------------------------------------------------------

    def _look(self) -> None:
        """Looks that are due: what Graph accepted is found; what it did not is queued again under
        `reconcile`, once nothing can come any more.
        """
        doubt = self.kit.store.doubt
        for one in doubt.take(10, lease=LEASE / 2, wait=WAIT):
            if self.copies[one.id]:
                assert doubt.found(Looked(one, "found", "by its marker", one.mailboxes[0]))
                self.model.found(one.id)
            elif self.model.policy is OnUnknown.RECONCILE:
                looked = Looked(one, "absent", "not there", one.mailboxes[0])
                then = doubt.nothing_came(looked, wait=WAIT, max_attempts=MAX_ATTEMPTS)
                assert then == self.model.nothing_came(one.id)

    def _pass(self, steps: int) -> None:
        """Halves of a lease; every time in the tables moves into the past instead."""
        seconds = steps * LEASE / 2 + 10
        self.model.now += seconds
        _move_times(self.kit, timedelta(seconds=seconds))

    def _sweep(self) -> None:
        """Leases and deadlines that ran out; what a cancel has left; batches that ended."""
        resend = self.model.policy is OnUnknown.RESEND
        if resend:
            for one, mail in self.model.mails.items():
                ends = mail.state is State.SENDING and mail.lease < self.model.now
                self.allowed[one] += ends
        ended = self.kit.end_leases(resend=resend, max_attempts=MAX_ATTEMPTS)
        assert ended == self.model.end_leases()
        assert sum(iter(self.kit.store.end_deadlines, 0)) == self.model.end_deadlines()
        assert self.kit.store.control.end_cancelled() == 0
        self.kit.look()
        for row in self.kit.store.finish_batches():
            assert self.model.over(row["id"])

    @invariant()
    @precondition(lambda self: hasattr(self, "model"))
    def a_lane_sees_what_is_due(self) -> None:
        """What a lane sees as due may be claimed, and if anything may, it sees some of it."""
        due = {one for one in self.model.mails if self.model.claimable(one)}

        seen = self.kit.look()

        assert (seen is not None) == bool(due)
        if seen is not None:
            assert {each.id for each in seen.due} <= due

    # ---- operators -----------------------------------------------------------------------------

    def _cancel(self, batch: str) -> None:
        try:
            self.kit.store.control.cancel(batch, by="ann", why=None)
        except WrongState:
            assert self.model.over(batch)
        else:
            self.model.cancel(batch)

    def _pause(self, batch: str, *, resume: bool) -> None:
        control = self.kit.store.control
        try:
            (control.resume if resume else control.pause)(batch, by="ann", why=None)
        except WrongState:
            assert self.model.batches[batch].cancelled or self.model.over(batch)
        else:
            self.model.batches[batch].paused = not resume

    def _retry(self, batch: str, *, include_unknown: bool) -> None:
        """Twice at once queues once. Who includes the unknown accepts a second copy of each."""
        if self.model.batches[batch].cancelled:
            with pytest.raises(WrongState):
                self.kit.retry(batch)
            return
        for one, mail in self.model.mails.items():
            if mail.batch == batch and mail.state is State.UNKNOWN and include_unknown:
                self.allowed[one] += 1
        queued = self.kit.retry(batch, include_unknown=include_unknown, age=LIFE)
        again = self.kit.retry(batch, include_unknown=include_unknown, age=LIFE)
        assert (queued, again) == (self.model.retry(batch, include_unknown=include_unknown), 0)

    # ---- promises ------------------------------------------------------------------------------

    @invariant()
    @precondition(lambda self: hasattr(self, "model"))
    def every_row_is_what_the_model_says(self) -> None:
        """I1, I2, I6, I8 and I12: no row more or less, each in the state it must be in, and every
        move a legal one.
        """
        m = messages.c
        with self.kit.engine.connect() as connection:
            rows = connection.execute(
                select(m.id, m.state, m.doubt, m.fence, m.tries, m.crashes)
            ).all()
        shown = {row.id: (State(row.state), *row[2:]) for row in rows}
        assert shown == {one: mail.shown() for one, mail in self.model.mails.items()}
        for one, (state, *_) in shown.items():
            before = self.before.get(one, State.QUEUED)
            reached = {before} | TRANSITIONS[before]
            # A retry and what follows it, or a sweep's two chores, are two moves.
            reached |= {then for state_ in reached for then in TRANSITIONS[state_]}
            assert state in reached
            self.before[one] = state

    @invariant()
    @precondition(lambda self: hasattr(self, "model"))
    def nothing_is_sent_twice_and_no_row_lies(self) -> None:
        """I3 and I4: one copy at most, but for those that somebody chose; sent is sent, and what
        is said not to be sent is not.
        """
        for one, mail in self.model.mails.items():
            copies = self.copies[one]
            assert copies <= 1 + self.allowed[one]
            assert mail.state is not State.SENT or copies
            assert mail.state not in NOT_SENT or not copies

    @invariant()
    @precondition(lambda self: hasattr(self, "model"))
    def doubt_has_its_cause(self) -> None:
        """I5 and I8: unknown because an attempt was; one word for each claim, and none else."""
        a = attempts.c
        with self.kit.engine.connect() as connection:
            told = connection.execute(select(a.message_id, a.fence, a.outcome, a.late)).all()
        doubtful = {row.message_id for row in told if row.outcome == "unknown"}
        for one, mail in self.model.mails.items():
            assert mail.state is not State.UNKNOWN or one in doubtful
        assert all(1 <= row.fence <= self.model.mails[row.message_id].fence for row in told)

    def teardown(self) -> None:
        """When nothing goes wrong any more, everything whole comes to rest, and is finished."""
        if not hasattr(self, "model"):
            return
        for batch, parcel in self.model.batches.items():
            if parcel.paused and not parcel.cancelled:
                self._pause(batch, resume=True)
        for _ in range(3 * MAX_ATTEMPTS):
            if self._rests():
                break
            self._pass(4)
            self._sweep()
            self._look()
            seen = self.kit.look()
            due = [each.id for each in seen.due] if seen else []
            claimed = self.kit.claim(due, lease=LEASE, token_left=TOKEN)
            assert claimed == self.model.claim(due)
            for one, fence in claimed.items():
                mail = self.model.mails[one]
                flight = Flight(
                    self.heads[mail.batch], one, fence, mail.tries, mail.doubt,
                    self.model.now + TOKEN,
                )  # fmt: skip
                self._record(flight, "202")
        self.every_row_is_what_the_model_says()
        self.nothing_is_sent_twice_and_no_row_lies()
        self._sweep()
        assert self._rests()
        unfinished = self.kit.sql(
            "SELECT id FROM batches WHERE sealed_at IS NOT NULL AND finished_at IS NULL"
        )
        assert unfinished == []

    def _rests(self) -> bool:
        """Everything whole is over."""
        return all(self.model.over(b) or not p.sealed for b, p in self.model.batches.items())


def _move_times(kit: Kit, by: timedelta) -> None:
    """Every time that the store compares with now lies so much earlier."""
    columns: Any = {
        messages: ("due_at", "deadline_at", "lease_until", "token_ends_at", "look_at"),
        attempts: ("at", "token_ends_at"),
        queues: ("next_due_at", "deadline_at"),
    }
    with kit.engine.begin() as connection:
        for table, names in columns.items():
            for row in connection.execute(select(table)).mappings().all():
                its = [column == row[column.name] for column in table.primary_key]
                moved = {name: row[name] - by for name in names if row[name] is not None}
                if moved:
                    connection.execute(table.update().where(*its).values(**moved))


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        if kit.engine.dialect.name == "sqlite":

            @event.listens_for(kit.engine, "connect")
            def _quick(connection: Any, _record: Any) -> None:
                connection.execute("PRAGMA synchronous=OFF")

        yield kit


@pytest.mark.timeout(300)
def test_the_store_does_what_the_model_does_in_any_order(kit: Kit, database_kind: str) -> None:
    """Random lives of a few messages, and then a rest in which everything ends."""
    bounded = type("Bounded", (Machine,), {"kit": kit})

    run_state_machine_as_test(
        bounded,
        settings=settings(
            max_examples=40 if database_kind == "sqlite" else 12, stateful_step_count=50,
            deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=PHASES,
        ),
    )  # fmt: skip
