"""What a run left behind: three books that know nothing of each other, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from tests.chaos.producer import read_journal

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class History:
    """The books, and what the faults allow."""

    policy: str  #: ON_UNKNOWN
    journal: Sequence[Row]  #: what the producers wrote down, in order
    ledger: Sequence[Row]  #: what Graph accepted, in order
    batches: Sequence[Row]
    messages: Sequence[Row]
    attempts: Sequence[Row]
    exposed: int  #: claims open at each fault, and one for each hostile answer
    too_early: int = 0  #: requests inside a Retry-After that its caller knew
    waiting: int = 0  #: chunks left in the inbox
    faults: Counter[str] = field(default_factory=Counter)

    def changed(self, **books: Any) -> History:
        """The history as it would be with these books instead."""
        return replace(self, **books)


def from_journals(paths: Sequence[Path]) -> list[Row]:
    """The producers' journals, one after the other."""
    return [line for path in paths for line in read_journal(path)]


def from_sql(url: str) -> dict[str, list[Row]]:
    """Batches, messages and attempts, read apart from the product."""
    queries = {
        "batches": "SELECT id, name, total, sealed_at, finished_at FROM batches",
        "messages": "SELECT id, batch_id, position, recipient, state, doubt, tries, fence, mailbox,"
        " error_code, request_id FROM messages",
        "attempts": "SELECT message_id, fence, late, outcome, status, code, request_id,"
        " client_request_id, worker, at FROM attempts ORDER BY at",
    }
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return {
                name: [
                    {key: _plain(key, value) for key, value in row.items()}
                    for row in connection.execute(text(query)).mappings()
                ]
                for name, query in queries.items()
            }
    finally:
        engine.dispose()


def _plain(key: str, value: Any) -> Any:
    return str(value) if key in {"id", "batch_id", "message_id"} else value
