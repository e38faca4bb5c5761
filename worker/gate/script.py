"""A Lua script in Redis, as an event loop calls it: calls of one moment share a round trip.

A call alone costs redis-py a connection from its pool, two system calls and three turns of the
loop: more than twice what it costs among a dozen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from copy import copy
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

_Call = tuple[Sequence[Any], asyncio.Future[Any]]  # keys and arguments, and who waits


class Script:
    """One script. Belongs to the loop on which it is called."""

    def __init__(self, redis: Redis, text: str) -> None:
        self._redis = redis
        self._text = text
        self._sha = redis.register_script(text).sha
        self._calls: list[_Call] = []
        self._under_way: set[asyncio.Task[None]] = set()

    async def __call__(self, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """The script's answer. Raises redis.RedisError: perhaps it ran, perhaps it did not."""
        loop = asyncio.get_running_loop()
        if not self._calls:  # the first of this moment; the others come before the loop turns
            loop.call_soon(self._begin)
        answer: asyncio.Future[Any] = loop.create_future()
        self._calls.append(((len(keys), *keys, *args), answer))
        return await answer

    def _begin(self) -> None:
        calls, self._calls = self._calls, []
        task = asyncio.get_running_loop().create_task(self._send(calls))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _send(self, calls: Sequence[_Call]) -> None:
        try:
            if unknown := await self._ask(calls):
                await self._redis.script_load(self._text)
                for _, answer in await self._ask(unknown):
                    _tell(answer, NoScriptError("Redis forgets its scripts again and again"))
        except Exception as error:  # noqa: BLE001  # each caller raises it, with its own traceback
            for _, answer in calls:
                _tell(answer, copy(error).with_traceback(error.__traceback__))
        finally:
            for _, answer in calls:
                answer.cancel()  # where this task was cancelled; it is nothing to the others

    async def _ask(self, calls: Sequence[_Call]) -> list[_Call]:
        """Answers these calls; gives those that did not run, for Redis does not know the script.

        Whoever waits no longer is not asked for.
        """
        calls = [call for call in calls if not call[1].done()]
        pipe = self._redis.pipeline(transaction=False)
        for words, _ in calls:
            pipe.execute_command("EVALSHA", self._sha, *words)
        found = await pipe.execute(raise_on_error=False)
        unknown = []
        for call, value in zip(calls, found, strict=True):
            if isinstance(value, NoScriptError):
                unknown.append(call)
            else:
                _tell(call[1], value)
        return unknown


def _tell(answer: asyncio.Future[Any], value: Any) -> None:
    if answer.done():  # whoever called waits no longer
        return
    if isinstance(value, Exception):
        answer.set_exception(value)
    else:
        answer.set_result(value)
