"""postroom health ...: for container probes. Exit status 0: well; 1: not, and why in one line."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import typer

from worker.cli import output
from worker.cli.doors import Json, migrated, runtime

if TYPE_CHECKING:
    from redis import Redis

app = typer.Typer(help="For container probes: live, ready, beat.", no_args_is_help=True)


@app.command()
def live(json: Json = False) -> None:
    """Does a worker of this host work? To be restarted where it does not.

    A Redis that does not answer is no reason: a restart mends nothing there.
    """
    from redis.exceptions import RedisError

    from worker import report

    host = socket.gethostname()
    with runtime() as rt:
        try:
            running = report.workers(rt.redis, host)
        except RedisError as error:
            _well(f"cannot tell: Redis does not answer ({type(error).__name__})", json)
            return
    if not running:
        raise output.Failed(f"no worker of {host} was heard of in the last seconds")
    _well(f"{running} of {host}", json)


@app.command()
def ready(json: Json = False) -> None:
    """Can this host work: does Redis answer, is the database there and migrated?"""
    with migrated() as rt:
        _ask(rt.redis)
    _well("Redis and database answer", json)


@app.command()
def beat(json: Json = False) -> None:
    """Was a ring of beat heard lately?"""
    from worker import report

    with runtime() as rt:
        _ask(rt.redis)
        heard = bool(rt.redis.exists(report.BEAT))
    if not heard:
        raise output.Failed("no ring of beat was heard lately")
    _well("beat rings", json)


def _ask(redis: Redis) -> None:
    redis.ping()  # its failure is explained where all are


def _well(detail: str, json: bool) -> None:
    if json:
        output.print_json({"healthy": True, "detail": detail})
    else:
        output.say(detail)
