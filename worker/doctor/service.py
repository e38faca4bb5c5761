"""The service itself: pools and limits, workers, beat, and what Flower shows to whom."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from urllib.parse import urlsplit, urlunsplit

import httpx

from worker import report
from worker.doctor.values import Check, Visit, failed, passed, skipped, warned
from worker.limits import Limit, Limits, Rate
from worker.meanings import START
from worker.meanings.bounces import of_sender, to_resume
from worker.model import State
from worker.store import Store
from worker.store.mailboxes import BY_OPERATOR

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
#: What Microsoft allows a mailbox; more is throttled, or bounces without a word to the sender.
#: https://learn.microsoft.com/graph/throttling-limits
#: https://learn.microsoft.com/office365/servicedescriptions/exchange-online-service-description/exchange-online-limits
_ALLOWED: Mapping[Limit, Rate] = {
    Limit.REQUESTS: Rate(10_000, timedelta(minutes=10)),
    Limit.RECIPIENTS: Rate(10_000, timedelta(hours=24)),
    Limit.UPLOAD: Rate(150_000_000, timedelta(minutes=5)),
}
_DAY = timedelta(hours=24)


def mailboxes(visit: Visit) -> Iterator[Check]:
    """Those from which nothing is sent until somebody mends something."""
    name = "mailboxes"
    if not visit.tables_work:
        yield skipped(name, "the database has no tables")
        return
    suspended = [one for one in visit.rt.store.mailboxes.all() if one["since"]]
    if not suspended:
        yield passed(name, "none is suspended")
        return
    first = suspended[0]
    others = f"; and {len(suspended) - 1} more" if len(suspended) > 1 else ""
    detail = f"{first['mailbox']} is suspended: {first['reason']} ({first['code']}){others}"
    resume = f"run: {to_resume(first['code'], first['mailbox'])}"
    if first["code"] == BY_OPERATOR:
        yield warned(name, detail, resume)
    elif of_sender(first["code"]):
        yield failed(name, detail, f"when Exchange lets it send again, {resume}")
    elif (visit.mailbox or "").lower() != first["mailbox"]:
        yield failed(name, detail, f"run: postroom doctor --mailbox {first['mailbox']}")
    elif visit.admitted:
        yield failed(name, detail, f"it may send now; {resume}")
    else:
        yield failed(name, detail, "mend what stands at mailbox; it is tried again by itself")


def limits(visit: Visit) -> Iterator[Check]:
    """Limits above Microsoft's; then pools that cannot work, or share what they seem to have."""
    name = "limits"
    if not visit.tables_work:
        yield skipped(name, "the database has no tables")
        return
    pools, base = visit.rt.pools(), visit.rt.settings.limits
    own = {one["mailbox"]: base.changed(one["limits"] or {})
           for one in visit.rt.store.mailboxes.all()}  # fmt: skip
    above = [*_above("the settings", base), *(a for m in own for a in _above(m, own[m], base))]
    if above:
        yield warned(name, "; ".join(above), "lower POSTROOM_MAILBOX_..._RATE, or: postroom "
                     "mailbox set MAILBOX --recipient-rate default")  # fmt: skip
    problems = _of_pools(pools)
    if problems:
        yield warned(
            name,
            "; ".join(sorted(problems)),
            "set the pools anew: postroom pool set NAME MAILBOX...",
        )
    elif not above:
        told = [f"pool {pool}: {_capacity([own.get(m, base) for m in members])}"
                for pool, members in sorted(pools.items())]  # fmt: skip
        yield passed(name, "; ".join([f"{base.slots} requests at once per mailbox", *told]))


def _above(whose: str, held: Limits, base: Limits | None = None) -> Iterator[str]:
    """The limits that let pass more than Microsoft does; where they are not those of `base`."""
    for limit, allowed in _ALLOWED.items():
        rate = held.rate(limit)
        if base is not None and rate == base.rate(limit):
            continue
        if rate is None or _most(rate, allowed.span) > allowed.amount:
            yield f"{whose}: {limit} {rate or 'off'}, but Microsoft allows {allowed}"


def _most(rate: Rate, span: timedelta) -> int:
    """What a rate lets pass in any such time."""
    return rate.amount * max(1, -(-span // rate.span))


def _capacity(members: Sequence[Limits]) -> str:
    """What the mailboxes of a pool can do together."""
    rates = [one.recipients for one in members]
    if not all(rates):
        return f"{len(members)} mailboxes"
    a_day = sum(_most(rate, _DAY) for rate in rates if rate)
    return f"{len(members)} mailboxes, {a_day:,} recipients a day"


def _of_pools(pools: Mapping[str, Sequence[str]]) -> list[str]:
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
    return problems


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
        yield _at_work(visit, running)
        return
    if visit.rt.inbox.waiting() or (visit.tables_work and _wait(visit.rt.store)):
        yield failed(name, "none is running, and messages wait", f"start one: {START}")
    else:
        yield warned(name, "none is running", f"start one: {START}")


def _wait(store: Store) -> bool:
    """Whether messages are due, or are held by a worker that is not there any more."""
    return bool(store.due_targets() or store.gauges.taken().messages[State.SENDING])


def _at_work(visit: Visit, running: int) -> Check:
    """Workers that run, and what keeps all of them from sending."""
    name, said, refusal = "workers", f"{running} running", visit.rt.refusal()
    if refusal is None:
        return passed(name, said)
    said += f"; their credential is refused ({refusal.code}) since {refusal.since:%Y-%m-%d %H:%MZ}"
    if not refusal.ours:
        fix = "restart them: the environment and .env are read at the start only"
        return failed(name, f"{said}, and it is not the one that is set here", fix)
    if visit.token is None:
        return failed(name, said, "mend what stands at credential")
    return warned(name, f"{said}, and is good by now", "nothing: they try it again by themselves, "
                  "in a quarter of an hour at most")  # fmt: skip


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
