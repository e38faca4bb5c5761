"""The usual way of a batch: chunk by chunk into the inbox, and a ring."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from worker.client.asking import ask
from worker.client.keeper import Keeper
from worker.client.spool import Spool
from worker.inbox import Batch
from worker.model import IdempotencyConflict, Unavailable

if TYPE_CHECKING:
    from worker.runtime import Runtime

log = logging.getLogger(__name__)


class Through:
    """The way through Redis. Everything raises Unavailable, with the batch's id."""

    def __init__(self, rt: Runtime, batch_id: str, *, repeat: bool) -> None:
        """`repeat`: the call may be one that was made before."""
        self._rt = rt
        self._batch_id = batch_id
        self._repeat = repeat

    def now(self) -> datetime:
        """Redis's time."""
        return self._rt.inbox.now(self._batch_id)

    def knows_pool(self, name: str) -> bool:
        """Whether the settings or SQL know this pool."""
        rt = self._rt
        if name in rt.settings.pools or rt.settings.database_url is None:
            return name in rt.settings.pools
        return name in ask(rt, rt.store.mailboxes.pools, self._batch_id)

    def append(self, batch: Batch, spool: Spool, keeper: Keeper) -> tuple[int, int]:
        """Appends what is not there yet, attachments first: (accepted, duplicates).

        Raises IdempotencyConflict, InboxFull as well.
        """
        rt = self._rt
        there = self._in_sql(batch) if self._repeat else {}
        accepted = duplicates = 0
        ring = False
        try:
            if len(there) < spool.chunks:
                for part in keeper.parts():
                    ring |= rt.parts.append(part, budget=rt.settings.inbox_budget,
                                            batch_id=batch.id)  # fmt: skip
            for chunk in spool.read():
                if chunk.number in there:
                    duplicates += chunk.count
                    continue
                appended = rt.inbox.append_chunk(
                    batch, chunk.number, count=chunk.count, first=chunk.first,
                    digest=chunk.digest, body=chunk.body, budget=rt.settings.inbox_budget,
                )  # fmt: skip
                accepted += chunk.count if appended.created else 0
                duplicates += 0 if appended.created else chunk.count
                ring |= appended.ring
        except Unavailable:
            ring = False  # who would hear it? and the caller has waited long enough
            raise
        finally:
            # Also for what came in before a failure: the sooner there is room again.
            if ring:
                self._ring()
        return accepted, duplicates

    def _in_sql(self, batch: Batch) -> Mapping[int, int]:
        """The chunks that SQL has, where Redis knows no more."""
        rt = self._rt
        if rt.inbox.known(batch.id) is not None:
            return {}
        seen = ask(rt, lambda: rt.store.batch_digest(batch.id), batch.id)
        if seen is None:
            return {}
        if seen.digest != batch.digest:
            raise IdempotencyConflict(batch.id)
        return dict(seen.chunks)

    def _ring(self) -> None:
        try:
            self._rt.ring_ingest()
        except Exception as error:  # noqa: BLE001  (a ring is a hint: the sweep looks every second)
            log.warning("the bell was not heard (%s)", type(error).__name__)
