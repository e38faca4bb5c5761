"""What tasks and ticker do, each with the parts of its process."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from typing import Any

from worker import settle as settling
from worker.bounces import Deps as Reading
from worker.bounces import read_bounces
from worker.deliver import SUSPENDED, Deps, Lane, Rules
from worker.ingest import ingest
from worker.meters import BOUNCES, LEASES, WAITS
from worker.runtime import Runtime
from worker.sweep import sweep, tell_ends
from worker.tasks.ringing import SOON, ring_after, wake
from worker.visit import Visitor

log = logging.getLogger(__name__)


async def run_lane(rt: Runtime, mailbox: str) -> dict[str, Any]:
    """A lane, and what must be rung after it."""
    with rt.lanes.at_work():
        result = await Lane(_lane_deps(rt), mailbox).run()
    if result.get("waits_for"):
        rt.meters.add(WAITS + result["waits_for"])
    if result.get("waits_for") not in {None, "held", SUSPENDED} and result["seconds"] <= SOON:
        ring_after(rt, mailbox, result["seconds"])
    return result


def run_ingest(rt: Runtime, seconds: float = math.inf) -> dict[str, int]:
    """Writes what lies in the inbox, for so many seconds at most.

    One thread of a process at a time, which goes on for whoever comes meanwhile: several would hold
    a block in memory each, and be no faster. Where it breaks off, the ticker begins anew.
    """
    end = time.monotonic() + seconds
    done = Counter[str]()

    def enough() -> bool:
        return rt.stop.is_set() or time.monotonic() > end

    rt.inbox_rung.set()
    while rt.inbox_rung.is_set() and not enough() and rt.taking_in.acquire(blocking=False):
        try:
            rt.inbox_rung.clear()
            rt.parts.drain(rt.name, rt.store.contents.arrive, enough)
            done.update(ingest(
                rt.inbox, rt.store, consumer=rt.name, max_age=rt.settings.max_age,
                wake=lambda targets: wake(rt, targets, news=True), enough=enough,
            ))  # fmt: skip
        finally:
            rt.taking_in.release()
    if rt.inbox_rung.is_set() and time.monotonic() > end and not rt.stop.is_set():
        rt.ring_ingest()  # for the task that came meanwhile, and is gone
    return dict(done)


def run_sweep(rt: Runtime) -> dict[str, int]:
    """Wakes lanes, ends what ran out, finishes batches, tells their applications."""
    ended: list[str] = []

    def finished(batch_id: str) -> None:
        rt.bell.finish(batch_id)
        ended.append(batch_id)

    done = sweep(
        rt.store, on_unknown=rt.settings.on_unknown, max_attempts=rt.settings.max_attempts,
        wake=lambda targets: wake(rt, targets, news=False), finished=finished,
    )  # fmt: skip
    for batch_id in ended:  # ingest may have died before it could, or it never became whole
        rt.inbox.forget(batch_id)
    rt.meters.add(LEASES, done["leases"])
    return done | {"told": tell_ends(rt.store, rt.callback.finished)}


def _lane_deps(rt: Runtime) -> Deps:
    s = rt.settings
    rules = Rules(
        lease=s.lease, request_timeout=s.request_timeout, max_attempts=s.max_attempts,
        on_unknown=s.on_unknown, internal_domains=s.internal_domains, staging=s.staging,
    )  # fmt: skip
    return Deps(
        store=rt.store, writer=rt.writer, gate=rt.gate, graph=rt.graph, tokens=rt.tokens,
        rules=rules, pools=rt.pools, worker=rt.name, stop=rt.stop, crowded=rt.crowded.is_set,
    )  # fmt: skip


async def run_settle(rt: Runtime) -> dict[str, int]:
    """Looks into mailboxes for messages in doubt; says what became of them."""
    s = rt.settings
    rules = settling.Rules(
        on_unknown=s.on_unknown, max_attempts=s.max_attempts, request_timeout=s.request_timeout,
        settle_margin=s.settle_margin,
    )  # fmt: skip
    deps = settling.Deps(
        store=rt.store, gate=rt.gate, graph=rt.graph, tokens=rt.tokens, rules=rules, stop=rt.stop
    )
    return await settling.settle(deps)


async def run_bounces(rt: Runtime) -> dict[str, int]:
    """Reads the reports that mail came back; says how many came, of which kind."""
    visitor = Visitor(rt.gate, rt.tokens, rt.store.mailboxes, rt.settings.request_timeout)
    hard = rt.settings.suppress_bounced == "on"
    done = await read_bounces(Reading(rt.store, rt.graph, visitor, rt.loops_redis, hard, rt.stop))
    for kind, n in done.items():
        rt.meters.add(BOUNCES + kind, n)
    return done
