"""The one who writes for all lanes of a process: their claims and outcomes share transactions.

While a transaction runs, what the lanes want next gathers for the following one. So a transaction
costs its milliseconds once for many messages, and the busier the process, the larger its share.
For the same reason lanes ask the gate between two transactions, all together, and the next one
waits a moment for those that are still asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from worker.model import State
from worker.store.retrying import is_passing, name_of
from worker.store.schema import is_in, messages
from worker.store.sending import Sending, ToClaim, ToRecord

log = logging.getLogger(__name__)

#: The first wait after a failed transaction and the longest, in seconds.
RETRY_FIRST, RETRY_LONGEST = 0.05, 2.0
#: A transaction waits for so long at most for lanes that ask the gate, in seconds.
GATHER = 0.005
#: A lane waits for so long at most for a transaction to end before it asks the gate, in seconds.
SETTLE = 0.05


@dataclass(slots=True)
class _Work:
    """What one transaction is to do, and who waits for it."""

    claims: list[tuple[list[ToClaim], asyncio.Future[dict[str, int]]]] = field(default_factory=list)
    results: list[tuple[ToRecord, asyncio.Future[bool]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.claims or self.results)


class Writer:
    """Group commit for one process. Lives on its event loop; the SQL runs in one thread."""

    def __init__(
        self, engine: Engine, sending: Sending, told: Callable[[ToRecord], None] = lambda _: None,
        committed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`told` hears of each outcome once it is committed, `committed` of each transaction."""
        self._engine = engine
        self._told = told
        self._sending = sending
        self._committed = committed
        self._next = _Work()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="postroom-writer")
        self._running: asyncio.Task[None] | None = None
        self._asking = 0  # lanes that may claim in a moment
        self._gathered, self._idle = asyncio.Event(), asyncio.Event()
        self._gathered.set()
        self._idle.set()

    async def until_idle(self) -> None:
        """Until no transaction runs, for a moment at most: what is claimed then is not split."""
        if not self._idle.is_set():
            await _set_within(SETTLE, self._idle)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While a lane asks the gate. What it claims right afterwards is waited for."""
        self._asking += 1
        self._gathered.clear()
        try:
            yield
        finally:
            self._asking -= 1
            if not self._asking:
                self._gathered.set()

    async def claim(self, wanted: Sequence[ToClaim]) -> dict[str, int]:
        """Claims what still may be sent; on return it is committed. Message id → fence."""
        future: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()
        self._next.claims.append((list(wanted), future))
        self._start()
        return await future

    def record(self, result: ToRecord) -> asyncio.Future[bool]:
        """Writes an outcome; when it is done it is committed. Whether the claim was still ours.

        No claim that is asked for from now on is committed before it. Waits for as long as the
        database is away: the outcome is known only here.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._next.results.append((result, future))
        self._start()
        return future

    def _start(self) -> None:
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._next:
            await asyncio.sleep(0)  # let the other lanes that are ready join this transaction
            if self._asking:
                await _set_within(GATHER, self._gathered)
            self._idle.clear()
            work, self._next = self._next, _Work()
            try:
                await self._commit(work)
            except Exception as error:
                # A bug must not leave the lanes waiting: it is theirs to end on.
                log.exception("the writer broke off")
                _refuse(work, error)
            finally:
                self._idle.set()

    async def _commit(self, work: _Work, again: bool = False) -> None:
        """`again`: it may have been committed already, and the answer was lost."""
        loop = asyncio.get_running_loop()
        wait = RETRY_FIRST
        while True:
            try:
                claimed, ours = await loop.run_in_executor(self._thread, self._write, work, again)
                break
            except SQLAlchemyError as error:
                if not is_passing(error):
                    await self._one_by_one(work, error, again)
                    return
                log.warning("the database does not answer (%s); trying again", name_of(error))
                await asyncio.sleep(wait)
                wait, again = min(wait * 2, RETRY_LONGEST), True
        self._committed()
        taken: set[str] = set()
        for wanted, claim in work.claims:
            mine = [c.id for c in wanted if c.id in claimed and c.id not in taken]
            taken.update(mine)
            _tell(claim, {one: claimed[one] for one in mine})
        for result, record in work.results:
            _tell(record, (result.id, result.fence) in ours)
            self._told(result)

    async def _one_by_one(self, work: _Work, error: SQLAlchemyError, again: bool) -> None:
        """What the database refuses must not take along what merely shared its transaction."""
        parts = [_Work(results=[one]) for one in work.results]
        parts += [_Work(claims=[one]) for one in work.claims]
        if len(parts) == 1:
            log.error("the database refuses a claim or an outcome (%s)", name_of(error))
            _refuse(work, error)
            return
        for part in parts:
            await self._commit(part, again)

    def _write(self, work: _Work, again: bool) -> tuple[dict[str, int], set[tuple[str, int]]]:
        # Two lanes of a pool may want the same message: the first one gets it, and only that one.
        first: dict[str, ToClaim] = {}
        for group, _ in work.claims:
            for c in group:
                first.setdefault(c.id, c)
        wanted = list(first.values())
        results = [result for result, _ in work.results]
        with self._engine.begin() as connection:
            ours = self._sending.record(connection, results) if results else set()
            claimed = self._sending.claim(connection, wanted) if wanted else {}
            if again and wanted:
                claimed |= _already_ours(connection, wanted)
        return claimed, ours

    async def close(self) -> None:
        """Waits for what is under way."""
        if self._running is not None:
            await self._running
        self._thread.shutdown(wait=True)


def _already_ours(connection: Connection, wanted: Sequence[ToClaim]) -> dict[str, int]:
    """Claims whose COMMIT was carried out although its answer was lost: they are ours.

    The mailbox tells them from what another lane of this process has in flight.
    """
    rows = connection.execute(
        select(messages.c.id, messages.c.fence, messages.c.worker, messages.c.mailbox).where(
            messages.c.id.in_([c.id for c in wanted]), is_in(State.SENDING)
        )
    )
    asked = {(c.id, c.worker, c.mailbox) for c in wanted}
    return {row.id: row.fence for row in rows if (row.id, row.worker, row.mailbox) in asked}


async def _set_within(seconds: float, event: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _refuse(work: _Work, error: Exception) -> None:
    futures: list[asyncio.Future[Any]] = [f for _, f in work.claims]
    futures += [f for _, f in work.results]
    for future in futures:
        if not future.done():
            future.set_exception(error)


def _tell(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
