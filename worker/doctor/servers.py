"""Redis, the database, and whether their clocks agree."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from redis.exceptions import RedisError, ResponseError
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from worker.doctor.values import Check, Status, Visit, failed, passed, skipped, warned
from worker.model import InvalidSettings, Unavailable
from worker.store import newest_revision, revision
from worker.store.clock import now

OLDEST = (6, 2)
#: Clocks may differ by so much, in seconds, before somebody is told.
TOLERATED = 5.0
#: Entra refuses an assertion whose times are off by more than a few minutes.
ASSERTION = 240.0


def redis(visit: Visit) -> Iterator[Check]:
    """Reachable, new enough, a primary; then what keeps the inbox safe."""
    client = visit.rt.redis
    try:
        client.ping()
        info = _info(client)
    except RedisError as error:
        yield failed(
            "redis",
            f"Redis does not answer ({type(error).__name__}: {_line(error)})",
            "start it (docker compose up -d redis), or correct POSTROOM_REDIS_URL",
        )
        return
    if info is None:
        visit.redis_works = True
        yield warned(
            "redis",
            "it answers; INFO is forbidden, so nothing else can be told",
            "ask its operator for: 6.2 or newer, appendonly yes, noeviction",
        )
        return
    version = version_of(info)
    if version.status is Status.FAIL:
        yield version
        return
    if info.get("role") == "slave":
        yield failed(
            "redis", "this Redis is a read-only replica", "let POSTROOM_REDIS_URL name the primary"
        )
        return
    visit.redis_works = True
    yield version
    yield append_only(info, _setting(client, "appendfsync"))
    yield eviction(info)
    yield memory(info, visit.rt.settings.inbox_budget)


def version_of(info: Mapping[str, Any]) -> Check:
    """Scripts and streams need 6.2; the others are of what INFO says as well."""
    version = str(info.get("redis_version", ""))
    if tuple(int(n) for n in version.split(".")[:2] if n.isdecimal()) < OLDEST:
        return failed("redis", f"Redis {version} is too old", "use Redis 6.2 or newer, or Valkey")
    return passed("redis", f"Redis {version} answers")


def append_only(info: Mapping[str, Any], fsync: str | None) -> Check:
    """What lies in the inbox must outlive Redis."""
    name = "redis append-only"
    enabled = info.get("aof_enabled")
    if enabled is None:
        return warned(name, "cannot tell: INFO does not say", "make sure of: appendonly yes")
    if not enabled:
        detail = "Redis keeps nothing over a restart: what waits in the inbox is lost with it"
        return failed(name, detail, "set appendonly yes")
    if info.get("aof_last_write_status", "ok") != "ok":
        return failed(name, "Redis cannot write its file", "look at its disk and its log")
    if fsync is None:
        return passed(name, "on; how often it syncs cannot be told, for CONFIG is forbidden")
    if fsync == "no":
        detail = "on, but when it reaches the disk is left to the system"
        return warned(name, detail, "set appendfsync everysec, or always")
    return passed(name, f"on, appendfsync {fsync}")


def eviction(info: Mapping[str, Any]) -> Check:
    """A full Redis must refuse, not forget."""
    name, policy = "redis eviction", info.get("maxmemory_policy")
    if policy is None:
        detail = "cannot tell: INFO does not say"
        return warned(name, detail, "make sure of: maxmemory-policy noeviction")
    if policy != "noeviction":
        detail = f"a full Redis throws keys away ({policy}), batches and limits among them"
        return failed(name, detail, "set maxmemory-policy noeviction")
    return passed(name, "noeviction")


def memory(info: Mapping[str, Any], budget: int) -> Check:
    """It must refuse before the system ends it."""
    name = "redis memory"
    limit, used = info.get("maxmemory"), int(info.get("used_memory", 0))
    if limit is None:
        return warned(name, "cannot tell: INFO does not say", "make sure of a maxmemory")
    if not limit:
        detail = (
            "no limit: when memory runs out, the system may end Redis instead of Redis refusing"
        )
        return warned(name, detail, "set maxmemory to what the machine can give")
    if used > limit * 0.8:
        detail = f"{_mb(used)} of {_mb(limit)} MB are used"
        return warned(name, detail, "raise maxmemory, or look what fills it: postroom batch list")
    if budget > limit * 0.8:
        detail = f"the inbox may take {_mb(budget)} MB, Redis has {_mb(limit)}"
        return warned(name, detail, "raise maxmemory, or lower POSTROOM_INBOX_BUDGET")
    return passed(name, f"{_mb(used)} of {_mb(limit)} MB are used")


def database(visit: Visit) -> Iterator[Check]:
    """Reachable, and at the newest revision."""
    schema = visit.rt.settings.db_schema or None
    try:
        at, wanted = revision(visit.rt.store.engine, schema), newest_revision()
    except InvalidSettings as error:
        yield failed("database", str(error), "set POSTROOM_DATABASE_URL")
        return
    except (Unavailable, DBAPIError, PoolTimeoutError) as error:
        yield failed("database", _line(error), "start it (docker compose up -d postgres), or "
                     "correct POSTROOM_DATABASE_URL")  # fmt: skip
        return
    kind = visit.rt.store.engine.dialect.name
    yield passed("database", f"{kind} answers")
    if at != wanted:
        is_at = f"they are at revision {at}, not {wanted}" if at else "there are none"
        yield failed("database tables", is_at, "run: postroom db upgrade")
        return
    visit.tables_work = True
    yield passed("database tables", f"revision {at}")


def clocks(visit: Visit) -> Iterator[Check]:
    """This machine's clock against Redis, the database and Microsoft."""
    name = "clocks"
    apart = {} if visit.microsofts_clock is None else {"Microsoft": visit.microsofts_clock}
    if visit.redis_works:
        seconds, micros = visit.rt.redis.time()
        apart["Redis"] = seconds + micros / 1e6 - _now()
    if visit.tables_work:
        with visit.rt.store.engine.execution_options(reads=True).connect() as connection:
            apart["the database"] = (
                connection.execute(select(now())).scalar_one().timestamp() - _now()
            )
    if not apart:
        yield skipped(name, "nothing to compare with answers")
        return
    words = ", ".join(f"{who} {by:+.1f} s" for who, by in apart.items())
    with_us = [0.0, *apart.values()]
    spread = max(with_us) - min(with_us)
    if spread > ASSERTION and visit.rt.settings.signs:
        yield failed(
            name,
            f"they differ: {words}; Entra refuses assertions of such a clock",
            "set the clocks (NTP)",
        )
    elif spread > TOLERATED:
        yield warned(
            name, f"they differ: {words}", "set the clocks (NTP); times in reports are off"
        )
    else:
        yield passed(name, f"they agree: {words}")


def _info(client: Any) -> dict[str, Any] | None:
    try:
        return dict(client.info())
    except ResponseError:
        return None


def _setting(client: Any, name: str) -> str | None:
    """A value of CONFIG; None where that is forbidden, as it is with hosted servers."""
    try:
        found = client.config_get(name)
    except ResponseError:
        return None
    value = next(iter(found.values()), None)
    return value.decode() if isinstance(value, bytes) else value


def _now() -> float:
    return time.time()  # noqa: TID251  (the one question here is what this clock says)


def _mb(size: int) -> int:
    return size // 1_000_000


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
