"""The service itself: pools and limits, workers, beat, and what Flower shows to whom."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import httpx

from worker import report
from worker.doctor.values import Check, Visit, failed, passed, skipped, warned

#: Where Flower listens if nobody says otherwise.
FLOWER = "http://127.0.0.1:5555"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_START = "celery -A worker worker -P threads -c 32"


def limits(visit: Visit) -> Iterator[Check]:
    """Pools that cannot work, or that share what they seem to have alone."""
    name = "limits"
    if not visit.tables_work:
        yield skipped(name, "the database has no tables")
        return
    pools = visit.rt.pools()
    problems = [f"pool {pool} has no mailbox" for pool, members in pools.items() if not members]
    shared = Counter(one for members in pools.values() for one in members)
    problems += [
        f"{one} is in {n} pools, which share its limits" for one, n in shared.items() if n > 1
    ]
    problems += [
        f"{one}: an onmicrosoft.com address may write to 100 external recipients a day"
        for one in shared
        if one.endswith(".onmicrosoft.com")
    ]
    if problems:
        yield warned(
            name,
            "; ".join(sorted(problems)),
            "set the pools anew: postroom pool set NAME MAILBOX...",
        )
        return
    told = "; ".join(
        f"pool {pool}: {len(members)} mailboxes" for pool, members in sorted(pools.items())
    )
    yield passed(
        name,
        f"{visit.rt.settings.mailbox_concurrency} requests at once per mailbox"
        + (f"; {told}" if told else ""),
    )


def external(visit: Visit) -> Iterator[Check]:
    """The tenant's own limit for recipients outside, which no mailbox can see.

    https://techcommunity.microsoft.com/blog/exchange/4372797
    """
    name, held = "external recipients", visit.rt.settings.tenant_external_rate
    if held != "off":
        yield passed(name, f"{held} for all mailboxes together")
        return
    yield warned(
        name,
        "the tenant's limit is not held here: 500 x licences^0.7 + 9,500 external recipients in "
        "24 hours (1 licence: 10,000; 100: 22,059; 1,000: 72,446), 5,000 for a trial; over it "
        "mails bounce (5.7.233)",
        "set POSTROOM_TENANT_EXTERNAL_RATE to your tenant's number, such as 22000/24h",
    )


def workers(visit: Visit) -> Iterator[Check]:
    """Somebody must do the work; without work to do, nobody need be there yet."""
    name = "workers"
    if not visit.redis_works:
        yield skipped(name, "Redis does not answer")
        return
    if running := report.workers(visit.rt.redis):
        yield passed(name, f"{running} running")
        return
    waiting = visit.rt.inbox.waiting() > 0
    waiting = waiting or (visit.tables_work and bool(visit.rt.store.due_targets()))
    if waiting:
        yield failed(name, "none is running, and messages wait", f"start one: {_START}")
    else:
        yield warned(name, "none is running", f"start one: {_START}")


def beat(visit: Visit) -> Iterator[Check]:
    """Beat is a second bell; the workers tick by themselves."""
    name = "beat"
    if not visit.redis_works:
        yield skipped(name, "Redis does not answer")
    elif visit.rt.redis.exists(report.BEAT):
        yield passed(name, "it rings")
    else:
        yield warned(
            name,
            "no ring of it was heard lately; nothing stands still without it",
            "start one: celery -A worker beat",
        )


def flower(visit: Visit) -> Iterator[Check]:
    """Whom Flower serves: its pages can stop workers, its API can run tasks."""
    name, url = "flower", visit.flower
    try:
        page, api = _status(url, "/workers"), _status(url, "/api/workers")
    except (httpx.HTTPError, OSError):
        yield skipped(name, f"none at {url} (--flower URL names another place)")
        return
    wider = _beyond_loopback(url)
    if api < 400:
        yield failed(
            name,
            f"its API at {url} runs tasks for whoever asks",
            "start it with --basic-auth=NAME:PASSWORD and without FLOWER_UNAUTHENTICATED_API",
        )
    elif page < 400:
        yield warned(
            name,
            f"its pages at {url} ask for no password",
            "start it with --basic-auth=NAME:PASSWORD",
        )
    elif wider:
        yield warned(
            name,
            f"it listens on {wider} too, and never asks who reads /metrics",
            "start it with --address=127.0.0.1, or put a proxy before it",
        )
    else:
        yield passed(name, f"{url} asks for a password")


def _status(url: str, path: str) -> int:
    return httpx.get(f"{url.rstrip('/')}{path}", timeout=5, trust_env=False).status_code


def _beyond_loopback(url: str) -> str | None:
    """Another address of this machine at which the same Flower answers."""
    parts = urlsplit(url)
    if parts.hostname not in _LOOPBACK:
        return None
    for address in sorted(_addresses() - _LOOPBACK):
        there = urlunsplit(parts._replace(netloc=f"{address}:{parts.port or 80}"))
        try:
            _status(there, "/healthcheck")
        except (httpx.HTTPError, OSError):
            continue
        return address
    return None


def _addresses() -> set[str]:
    """The addresses of this machine, and one that only those who bind to all of them answer."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except OSError:
        found = []
    return {"127.0.0.2"} | {str(entry[4][0]) for entry in found}
