"""The chaos run in short, and the proof that its checker sees what it is there to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.chaos.checker import RULES, check
from tests.chaos.history import History, Row
from tests.chaos.plan import FAULTS, Plan
from tests.chaos.producer import address, subject
from tests.chaos.run import LONGEST_WAIT, run

Corruption = Callable[[History], History]


@pytest.mark.timeout(420)
def test_nothing_is_lost_and_nothing_sent_twice_whatever_breaks() -> None:
    """Every kind of fault at least once, on real processes; three books that must agree. It may
    take its time to come to rest: how fast this machine is proves nothing.
    """
    plan = Plan(messages=900, seconds=30, seed=11)

    result = run(plan, lambda _: None, rest=LONGEST_WAIT)

    assert result.violations == [], result.table()
    # On a slow machine the producers may be through before their kill comes.
    kinds = {kind for kind, (_, least) in FAULTS.items() if least} - {"producer_kill"}
    assert kinds <= set(result.history.faults), result.table()
    assert len(result.history.messages) >= 0.8 * plan.messages  # a producer may abandon a call
    assert len(result.history.ledger) >= 0.7 * plan.messages


def test_the_same_seed_plans_the_same_run() -> None:
    """A run that failed can be planned again."""
    one, two, other = Plan(seed=7), Plan(seed=7), Plan(seed=8)

    assert one.calls() == two.calls() != other.calls()
    assert one.faults() == two.faults() != other.faults()
    assert sum(call["rows"] for call in one.calls()) == one.messages
    assert one.counts()["worker_kill"] + 3 * one.counts()["all_workers_kill"] == 100
    assert one.counts()["redis_kill"] == 10
    assert one.counts()["postgres_stop"] == 5
    assert one.counts()["worker_pause"] == 20


# ---- the checker --------------------------------------------------------------------------------

KEY = "s0-0"
#: Row -> state, copies that Graph accepted, outcomes of its attempts.
ROWS: dict[int, tuple[str, int, list[str]]] = {
    1: ("sent", 1, ["accepted"]),
    2: ("sent", 1, ["throttled", "notsent", "accepted"]),
    3: ("unknown", 1, ["unknown"]),
    4: ("unknown", 0, ["unknown"]),
    5: ("failed", 0, ["rejected"]),
    6: ("sent", 1, ["unknown", "accepted"]),  # settled as absent, and sent again
}


def clean(policy: str = "hold") -> History:
    """A history in which every promise was kept."""
    messages: list[Row] = []
    attempts: list[Row] = []
    ledger: list[Row] = []
    for row, (state, copies, outcomes) in ROWS.items():
        messages.append(message(row, state, len(outcomes)))
        attempts += [attempt(row, fence, word) for fence, word in enumerate(outcomes, 1)]
        ledger += [entry(row, len(outcomes)) for _ in range(copies)]
    journal = [
        told("call", rows=len(ROWS), word="first"),
        told("receipt", accepted=len(ROWS), duplicates=0, batch="b-0"),
        told("again", accepted=0, duplicates=len(ROWS), batch="b-0"),
        told("conflict", conflict=True),
        {"do": "call", "key": "s0-1", "rows": 1, "word": "first"},
        {"do": "abandoned", "key": "s0-1"},
    ]
    batches: list[Row] = [
        {"id": "b-0", "sealed_at": 1, "finished_at": 2},
        {"id": "b-1", "sealed_at": None, "finished_at": None},
    ]
    messages.append(
        {**message(1, "queued", 0), "id": "m-9", "batch_id": "b-1",
         "recipient": address("s0-1", 1)}
    )  # fmt: skip
    return History(policy, journal, ledger, batches, messages, attempts, exposed=2)


def told(do: str, **more: Any) -> Row:
    return {"do": do, "key": KEY, **more}


def message(row: int, state: str, fence: int) -> Row:
    return {"id": f"m-{row}", "batch_id": "b-0", "recipient": address(KEY, row), "state": state,
            "doubt": state == "unknown", "fence": fence}  # fmt: skip


def attempt(row: int, fence: int, outcome: str, *, late: bool = False) -> Row:
    return {"message_id": f"m-{row}", "fence": fence, "late": late, "outcome": outcome,
            "request_id": f"r-{row}-{fence}", "client_request_id": f"c-{row}-{fence}",
            "code": None}  # fmt: skip


def entry(row: int, fence: int, **changes: Any) -> Row:
    return {"recipients": [address(KEY, row)], "marker": f"m-{row}", "time": 1.0,
            "subject": subject(KEY, row), "request_id": f"r-{row}-{fence}",
            "client_request_id": f"c-{row}-{fence}", **changes}  # fmt: skip


def with_row(h: History, row: int, **changes: Any) -> History:
    """The history with this message's row changed."""
    its = f"m-{row}"
    return h.changed(messages=[{**m, **changes} if m["id"] == its else m for m in h.messages])


def without_row(h: History, row: int) -> History:
    return h.changed(messages=[m for m in h.messages if m["id"] != f"m-{row}"])


def more(h: History, **books: list[Row]) -> History:
    return h.changed(**{name: [*getattr(h, name), *rows] for name, rows in books.items()})


def journal_with(h: History, do: str, **changes: Any) -> History:
    return h.changed(journal=[{**x, **changes} if x["do"] == do else x for x in h.journal])


#: A bug that someone may build one day -> what a run with it leaves behind, and what must be said.
BUGS: dict[str, tuple[Corruption, str]] = {
    "the inbox is acknowledged before the commit": (lambda h: without_row(h, 1), "lost"),
    "a Celery message is the only copy": (lambda h: without_row(h, 5), "lost"),
    "a chunk is written twice": (lambda h: more(h, messages=[message(2, "sent", 3)]), "lost"),
    "no fence: a zombie's refusal overwrites a newer 202": (
        lambda h: with_row(more(h, attempts=[attempt(1, 2, "rejected")]), 1, state="failed",
                           fence=2),
        "contradiction",
    ),
    "no fence: two claims under one number": (
        lambda h: more(h, attempts=[attempt(1, 1, "rejected")]), "fence",
    ),
    "a 504 is sent again": (lambda h: more(h, ledger=[entry(6, 1)]), "sent twice"),
    "no settle time: a look too early, and the copy comes after all": (
        lambda h: more(h, ledger=[entry(6, 1)]), "sent twice",
    ),
    "a slot is never given back": (
        lambda h: with_row(h, 4, state="queued", doubt=False), "not at rest",
    ),
    "a Retry-After is ignored": (lambda h: h.changed(too_early=1), "called too early"),
    "the row is updated before the request is made": (
        lambda h: h.changed(ledger=[e for e in h.ledger if e["marker"] != "m-2"]), "contradiction",
    ),
    "a message that went out is cancelled": (
        lambda h: with_row(h, 3, state="cancelled", doubt=False), "contradiction",
    ),
    "doubt is forgotten when a message is queued again": (
        lambda h: with_row(h, 3, state="queued", doubt=False), "contradiction",
    ),
    "the 202 of another message is recorded": (
        lambda h: h.changed(attempts=[{**a, "client_request_id": "c-1-1"}
                                      if a["message_id"] == "m-2" else a for a in h.attempts]),
        "evidence",
    ),
    "a look finds what was never sent": (
        lambda h: more(h, attempts=[{**attempt(4, 1, "accepted", late=True),
                                     "code": "FoundInMailbox"}]),
        "evidence",
    ),
    "what was never tried is unknown": (
        lambda h: h.changed(attempts=[a for a in h.attempts if a["message_id"] != "m-4"]),
        "doubt without cause",
    ),
    "a row that nobody enqueued": (
        lambda h: more(h, messages=[message(99, "failed", 1)]), "invented",
    ),
    "the second content of a key is sent": (
        lambda h: h.changed(ledger=[{**e, "subject": "other"} if e["marker"] == "m-1" else e
                                    for e in h.ledger]),
        "other content",
    ),
    "a mail without its message's marker": (
        lambda h: h.changed(ledger=[{**e, "marker": None} if e["marker"] == "m-3" else e
                                    for e in h.ledger]),
        "other content",
    ),
    "half a batch is sent": (
        lambda h: more(h, ledger=[{**entry(1, 1), "recipients": [address("s0-1", 1)],
                                   "marker": "m-9"}]),
        "open batch",
    ),
    "other content under a key is taken": (
        lambda h: journal_with(h, "conflict", conflict=False), "receipt",
    ),
    "a repeated call adds messages": (
        lambda h: journal_with(h, "again", accepted=6, duplicates=0), "receipt",
    ),
    "a repeated call is refused": (lambda h: journal_with(h, "again", conflict=True), "receipt"),
    "a chunk stays in the inbox": (lambda h: h.changed(waiting=1), "not at rest"),
    "a batch is never finished": (
        lambda h: h.changed(batches=[{**x, "finished_at": None} for x in h.batches]),
        "not at rest",
    ),
    "more is in doubt than was in flight": (lambda h: h.changed(exposed=1), "too much doubt"),
    "reconcile leaves doubt": (lambda h: h.changed(policy="reconcile"), "too much doubt"),
}  # fmt: skip


def promises(history: History) -> set[str]:
    return {violation.promise for violation in check(history)}


def test_a_clean_history_passes() -> None:
    """The checker cries only where something is wrong."""
    assert check(clean()) == []
    settled = with_row(with_row(clean("reconcile"), 3, state="sent"), 4, state="failed")
    assert check(settled) == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_history_with_a_bug_is_seen_for_what_it_is(bug: str) -> None:
    """Each known bug, as it would show in the books: the checker names the promise it breaks."""
    corrupt, promise = BUGS[bug]

    assert promise in promises(corrupt(clean()))


def test_every_rule_of_the_checker_is_proved_by_a_bug() -> None:
    """A rule that no corrupted history breaks might as well not be there."""
    assert {promise for _, promise in BUGS.values()} == set(RULES)


def test_resend_may_send_once_more_for_each_doubt_and_no_more() -> None:
    """Who chose resend accepts a second copy, never a third."""
    twice = more(clean("resend"), ledger=[entry(6, 1)])

    assert check(twice) == []
    assert promises(more(twice, ledger=[entry(6, 1)])) == {"sent twice"}


def test_a_run_needs_sensible_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typing mistake is answered in one line, with what is allowed."""
    from tests.chaos.__main__ import main

    for name, value in _mistakes():
        monkeypatch.setenv(name, value)
        assert main() == 2
        assert capsys.readouterr().err.startswith(f"chaos: {name}: ")
        monkeypatch.delenv(name)


def _mistakes() -> Iterator[tuple[str, str]]:
    yield "N", "many"
    yield "N", "3"
    yield "SECONDS", "0"
    yield "SEED", "-1"
    yield "ON_UNKNOWN", "guess"
