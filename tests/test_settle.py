"""Looks into real mailboxes: the flow that settles doubt, against simulator, Redis and SQL."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from redis.asyncio import Redis as AsyncRedis

from tests import doors_kit
from tests.store_kit import MAILBOX, Kit, to_record
from tests.support import free_port, wait_until
from worker.gate import Gate
from worker.graph import payload
from worker.limits import Limits
from worker.model import OnUnknown, State, Unknown
from worker.policy import conclude
from worker.settle import Deps, Rules, settle
from worker.simulator import Simulator

PAST = datetime.now(UTC) - timedelta(hours=1)
OTHER = "other@contoso.com"


@dataclass
class World:
    """One process's doors, and the hands that bring messages into doubt."""

    runner: asyncio.Runner
    deps: Deps
    simulator: Simulator
    kit: Kit
    stop: Event

    def settle(self, **rules: Any) -> dict[str, int]:
        """One round of looks."""
        deps = replace(self.deps, rules=replace(self.deps.rules, **rules))
        return self.runner.run(settle(deps))

    def in_doubt(
        self, one: str, head: Any, fault: str = "status_after", mailbox: str = MAILBOX,
        token_left: float = 3000.0,
    ) -> None:  # fmt: skip
        """Sends the message, with this fault, and records the doubt; a look is due."""
        token = self.deps.tokens.get()
        fence = self.kit.claim([one], mailbox=mailbox, token_left=token_left)[one]
        self.simulator.fault(fault)
        content = {"to": [{"address": "ann@example.org"}]}
        body = payload(content, message_id=one, subject="News", html=None, text="Hello")
        deadline = time.monotonic() + 60
        sending = self.deps.graph.send(mailbox, body, token.value, deadline=deadline)
        outcome = self.runner.run(sending)
        assert isinstance(outcome, Unknown), outcome
        verdict = conclude(
            outcome, tries=0, doubt=False, max_attempts=6, on_unknown=OnUnknown.HOLD, jitter=0.0
        )
        verdict = replace(verdict, cooldown=None)  # it has rested
        told = to_record(head, one, fence, verdict, outcome)
        self.kit.record(replace(told, mailbox=mailbox, token_left=token_left))
        self.due(one)

    def batch(self, count: int = 1, fault: str = "status_after", **how: Any) -> tuple[Any, Any]:
        """A batch whose messages are all in doubt, their looks due; head and ids."""
        head, ids = self.kit.batch(count)
        for one in ids:
            self.in_doubt(one, head, fault, **how)
        return head, ids

    def due(self, one: str) -> None:
        """Time has passed: the next look is due."""
        self.kit.put(one, look_at=PAST)

    def state(self, one: str) -> State:
        return State(self.kit.message(one)["state"])

    def looks(self, one: str) -> list[tuple[str, str]]:
        """What the audit tells of the looks: mailbox and result."""
        return [(e["mailbox"], e["detail"]["result"]) for e in self.kit.message(one)["events"]
                if e["kind"] == "look"]  # fmt: skip

    def asked(self) -> Counter[str]:
        """How many searches each mailbox had."""
        return Counter(r["mailbox"] for r in self.simulator.requests() if r["operation"] == "read")


@pytest.fixture
def simulator_options() -> dict[str, Any]:
    """What a test asks of the simulator beyond its defaults."""
    return {}


@pytest.fixture
def world(
    tmp_path: Path, redis_url: str, migrated_url: str, simulator_options: dict[str, Any]
) -> Iterator[World]:
    rules = Rules(OnUnknown.HOLD, 6, doors_kit.TIMEOUT, timedelta(minutes=5))
    kit, stop = Kit(migrated_url), Event()
    with doors_kit.opened(tmp_path, redis_url, **simulator_options) as doors, closing(kit.store):
        deps = Deps(kit.store, doors.gate, doors.graph, doors.tokens, rules, stop)
        yield World(doors.runner, deps, doors.simulator, kit, stop)


#: Long enough ago that nothing of a request with this token can come any more.
ENDED = -1000.0


@pytest.mark.parametrize("on_unknown", list(OnUnknown))
def test_what_was_sent_is_found(world: World, on_unknown: OnUnknown) -> None:
    """A 504 after Graph had accepted it: the mailbox tells, whatever the policy."""
    _, [one] = world.batch(token_left=ENDED)

    assert world.settle(on_unknown=on_unknown) == {"found": 1}

    found = world.kit.message(one)
    assert (found["state"], found["doubt"]) == (State.SENT, False)
    assert world.looks(one) == [(MAILBOX, "found")]
    [mail] = world.simulator.ledger()
    [look] = [e for e in found["events"] if e["kind"] == "look"]
    assert look["detail"]["graph_id"] == mail["id"]
    assert [a["outcome"] for a in found["attempts"]] == ["unknown", "accepted"]
    assert world.settle() == {}


@pytest.mark.parametrize("simulator_options", [{"drafts_seconds": 3600}])
def test_what_lies_in_drafts_was_accepted(world: World) -> None:
    """Graph answers 202 when a mail lies there; the rest of its way takes a while."""
    _, [one] = world.batch(token_left=ENDED)

    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"found": 1}
    assert world.state(one) is State.SENT


@pytest.mark.parametrize("simulator_options", [{"drafts_seconds": 3600}])
def test_a_draft_that_was_made_before_it_is_sent_is_no_evidence(world: World) -> None:
    """A message with large attachments lies in Drafts before anybody sends it."""
    _, [early] = world.batch(token_left=3000.0)
    _, [late] = world.batch(token_left=ENDED)
    for one in (early, late):
        world.kit.sql(
            "INSERT INTO drafts (message_id, mailbox, at, released)"
            " VALUES (:id, :mailbox, CURRENT_TIMESTAMP, true)", id=one, mailbox=MAILBOX,
        )  # fmt: skip

    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"absent": 1, "requeued": 1}

    assert world.state(early) is State.UNKNOWN
    assert world.state(late) is State.QUEUED
    [look] = [e for e in world.kit.message(early)["events"] if e["kind"] == "look"]
    assert look["why"] == "only its draft is in the mailbox; it may still come"


def test_absent_is_not_believed_while_something_may_come(world: World) -> None:
    """The looks come at a growing pace, and one when the token has ended for good."""
    _, [one] = world.batch(fault="reset_before", token_left=3000.0)

    for pace in (120, 600, 1800, 3000 + 310, 3000 + 310):
        assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"absent": 1}
        found = world.kit.message(one)
        assert (found["state"], found["doubt"]) == (State.UNKNOWN, True)
        seconds = (found["look_at"] - datetime.now(UTC)).total_seconds()
        assert pace - 60 < seconds <= pace
        world.due(one)
    assert world.asked()[MAILBOX] == 5


def test_hold_keeps_what_is_absent_for_a_person(world: World) -> None:
    """After the last look nobody looks any more."""
    _, [one] = world.batch(fault="reset_before", token_left=ENDED)

    assert world.settle() == {"absent": 1}

    found = world.kit.message(one)
    assert (found["state"], found["look_at"]) == (State.UNKNOWN, None)
    [look] = [e for e in found["events"] if e["kind"] == "look"]
    assert look["why"] == "not in the mailbox, and nothing can come any more"


def test_reconcile_queues_what_surely_was_not_sent(world: World) -> None:
    """Without doubt: it may be sent again, and end like any other message."""
    _, [one] = world.batch(fault="reset_before", token_left=ENDED)

    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"requeued": 1}

    found = world.kit.message(one)
    assert (found["state"], found["doubt"], found["look_at"]) == (State.QUEUED, False, None)
    assert [due.id for due in world.kit.look().due] == [one]


@pytest.mark.parametrize("simulator_options", [{"search_delay": 3}])
def test_copies_that_searches_find_late_are_found_in_the_end(world: World) -> None:
    """Absent now is not absent for good."""
    _, [one] = world.batch(token_left=300.0)
    seen: list[dict[str, int]] = []

    def found() -> bool:
        world.due(one)
        seen.append(world.settle(on_unknown=OnUnknown.RECONCILE))
        return seen[-1] == {"found": 1}

    wait_until(found, "searches find it")

    assert seen[:-1] == [{"absent": 1}] * (len(seen) - 1)
    assert world.state(one) is State.SENT


def test_every_mailbox_that_may_have_sent_it_is_searched(world: World) -> None:
    """A pool's message that was tried twice: the last mailbox first, found in the other."""
    head, [one] = world.kit.batch()
    world.in_doubt(one, head, "status_after", mailbox=OTHER, token_left=ENDED)
    world.kit.store.control.retry(head.id, include_unknown=True, by="x", why=None, age=60)
    world.in_doubt(one, head, "reset_before", mailbox=MAILBOX, token_left=ENDED)

    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"found": 1}

    assert world.looks(one) == [(OTHER, "found")]
    assert world.asked() == Counter({MAILBOX: 1, OTHER: 1})


def test_absent_in_one_mailbox_is_not_enough(world: World) -> None:
    """The other one may not be read: it stays unknown."""
    head, [one] = world.kit.batch()
    world.in_doubt(one, head, "reset_before", mailbox=OTHER, token_left=ENDED)
    world.kit.store.control.retry(head.id, include_unknown=True, by="x", why=None, age=60)
    world.in_doubt(one, head, "reset_before", mailbox=MAILBOX, token_left=ENDED)
    world.simulator.fault("status", 1, status=403, operation="read", mailbox=OTHER)

    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"forbidden": 1}
    assert world.looks(one) == [(OTHER, "forbidden")]
    assert world.state(one) is State.UNKNOWN


@pytest.mark.parametrize("simulator_options", [{"mail_read": False}])
def test_without_mail_read_one_request_an_hour_asks_for_all(world: World) -> None:
    """They stay unknown with that reason, and say what to do."""
    _, ids = world.batch(5, token_left=ENDED)

    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"forbidden": 5}

    assert world.asked() == Counter({MAILBOX: 1})
    for one in ids:
        found = world.kit.message(one)
        assert (found["state"], found["error_code"]) == (State.UNKNOWN, "LookForbidden")
        assert 3500 < (found["look_at"] - datetime.now(UTC)).total_seconds() <= 3600
        [look] = [e for e in found["events"] if e["kind"] == "look"]
        assert "grant Mail.Read" in look["why"]

    world.simulator.settings(mail_read=True)
    for one in ids:
        world.due(one)
    assert world.settle() == {"found": 5}, "once it is granted, they are settled"


def test_what_leaves_no_copy_is_never_looked_for(world: World) -> None:
    """It stays unknown, whatever the policy, and nobody is asked."""
    _, [one] = world.batch(fault="reset_before", token_left=ENDED)
    world.kit.put(one, content={"to": [], "save_to_sent_items": False})

    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"no_copy": 1}

    found = world.kit.message(one)
    assert (found["state"], found["look_at"]) == (State.UNKNOWN, None)
    assert found["error_code"] == "NoSentCopy"
    assert not world.asked()


def test_what_kills_its_worker_is_not_queued_again(world: World) -> None:
    """Quarantined: a person decides."""
    _, [one] = world.batch(fault="reset_before", token_left=ENDED)
    world.kit.put(one, crashes=3)

    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"absent": 1}
    assert world.state(one) is State.UNKNOWN
    assert world.kit.message(one)["look_at"] is None


@pytest.mark.parametrize(
    ("fault", "again"),
    [
        ({"kind": "status", "status": 503}, 10),
        ({"kind": "status", "status": 200, "body": {"value": None}}, 10),
        ({"kind": "reset_before"}, 10),
        ({"kind": "garbage"}, 10),
        ({"kind": "cut_after_status"}, 10),
    ],
)
def test_a_look_that_goes_wrong_says_nothing(
    world: World, fault: dict[str, Any], again: int
) -> None:
    """It is repeated soon; sends of the mailbox go on."""
    _, [one] = world.batch(fault="reset_before", token_left=ENDED)
    world.simulator.fault(**fault, operation="read")

    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"trouble": 1}

    found = world.kit.message(one)
    assert found["state"] == State.UNKNOWN
    assert 0 < (found["look_at"] - datetime.now(UTC)).total_seconds() <= again
    assert world.looks(one) == [(MAILBOX, "trouble")]
    world.due(one)
    assert world.settle(on_unknown=OnUnknown.RECONCILE) == {"requeued": 1}


def test_a_look_that_is_told_to_wait_is_the_last_one(world: World) -> None:
    """503 with a Retry-After: nobody asks before, not for the messages beside it either."""
    _, ids = world.batch(3)
    world.simulator.fault("status", 0, operation="read", headers={"Retry-After": "400"})
    assert world.settle() == {"postponed": 2, "trouble": 1}
    for one in ids:
        again = (world.kit.message(one)["look_at"] - datetime.now(UTC)).total_seconds()
        assert 380 < again <= 400
        world.due(one)
    assert world.settle() == {"postponed": 3}
    assert world.asked() == Counter({MAILBOX: 1})


def test_a_look_that_is_throttled_cools_the_mailbox_down(world: World) -> None:
    """For the lanes too; and while it cools, nobody looks."""
    _, [one, other] = world.batch(2, token_left=ENDED)
    world.simulator.fault("throttle", operation="read", retry_after="30")

    assert world.settle() == {"postponed": 1, "trouble": 1}
    assert world.asked() == Counter({MAILBOX: 1})
    for message in (one, other):
        found = world.kit.message(message)
        assert found["state"] == State.UNKNOWN
        assert 10 < (found["look_at"] - datetime.now(UTC)).total_seconds() <= 121


def test_a_revoked_token_costs_a_look_one_repeat(world: World) -> None:
    """At once, with a new one."""
    world.batch(token_left=ENDED)
    world.simulator.revoke_tokens()

    assert world.settle() == {"found": 1}
    assert world.simulator.stats()["token_requests"] == 2


def test_a_look_that_goes_wrong_again_and_again_comes_ever_later(world: World) -> None:
    """Trouble that lasts costs few requests, trouble that passes little time."""
    _, [one] = world.batch(token_left=ENDED)
    world.simulator.fault("garbage", 0, operation="read")
    waits = []
    for _ in range(5):
        assert world.settle() == {"trouble": 1}
        waits.append(world.kit.message(one)["events"][-1]["detail"]["again_after"])
        world.due(one)
    assert waits == [10, 30, 120, 300, 300]


def test_a_refused_credential_postpones_all_looks(world: World) -> None:
    """Nothing is counted as a look."""
    _, [one] = world.batch(token_left=ENDED)
    world.simulator.revoke_tokens()
    world.simulator.fault("token_status", 0, status=503)

    assert world.settle() == {"postponed": 1}

    assert world.kit.message(one)["looks"] == 0
    assert world.kit.message(one)["look_at"] > datetime.now(UTC)


def test_a_redis_that_is_gone_postpones_all_looks_for_seconds(world: World) -> None:
    """Nothing is asked without the gate; and nobody waits for the lease of who took the looks."""
    _, ids = world.batch(2, token_left=ENDED)
    nobody = AsyncRedis(host="127.0.0.1", port=free_port())
    gone = replace(world.deps, gate=Gate(nobody, Limits(), history=doors_kit.nothing))

    assert world.runner.run(settle(gone)) == {"postponed": 2}

    for one in ids:
        again = (world.kit.message(one)["look_at"] - datetime.now(UTC)).total_seconds()
        assert 0 < again <= 10
        world.due(one)
    assert world.asked() == Counter()
    assert world.settle() == {"found": 2}


def test_looks_never_take_more_than_the_mailbox_has(world: World) -> None:
    """With its slots taken by sends, a look waits; many looks are one at a time a mailbox."""
    _, ids = world.batch(6, token_left=ENDED)
    _, others = world.batch(6, token_left=ENDED, mailbox=OTHER)
    gate = world.deps.gate
    for n in range(4):
        assert world.runner.run(gate.visit(MAILBOX, f"s{n}", 60)).count == 1

    assert world.settle() == {"found": 6, "postponed": 6}

    assert {world.state(one) for one in others} == {State.SENT}
    for one in ids:
        assert 0 < (world.kit.message(one)["look_at"] - datetime.now(UTC)).total_seconds() <= 61
        world.due(one)
    for n in range(4):
        world.runner.run(gate.give_back(MAILBOX, f"s{n}"))
    assert world.settle() == {"found": 6}
    assert max(world.simulator.stats()["max_concurrent"].values()) == 1


def test_a_process_that_stops_looks_no_more(world: World) -> None:
    """What it took is somebody else's."""
    world.batch(3, token_left=ENDED)
    world.stop.set()

    assert world.settle() == {}
    assert not world.asked()


def test_looks_keep_what_an_operator_set_for_this_mailbox(world: World) -> None:
    """What its lane has used up is not there for a look either, whatever the settings allow."""
    own = {"requests": "1/h"}
    _, [one] = world.batch(token_left=ENDED)
    world.deps.store.mailboxes.limit(MAILBOX, own, by="test", why=None)
    gate = world.deps.gate
    limits = gate.limits.changed(own)
    assert world.runner.run(gate.visit(MAILBOX, "send", 60, limits=limits)).count == 1

    assert world.settle() == {"postponed": 1}
    assert not world.asked()

    world.deps.store.mailboxes.limit(MAILBOX, dict.fromkeys(own), by="test", why=None)
    world.due(one)
    assert world.settle() == {"found": 1}
