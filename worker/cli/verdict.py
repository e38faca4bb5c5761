"""What SQL says was sent, compared message by message with what the simulator accepted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from worker.model import State


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of messages."""

    duplicates: int  #: accepted a second time, or a third
    disagreements: int  #: SQL and ledger say different things
    unknown_in_ledger: int  #: in doubt in SQL, but accepted


def compare(rows: Iterable[Mapping[str, Any]], ledger: Iterable[Mapping[str, Any]]) -> Verdict:
    """`sent` wants exactly one entry of the ledger with the message's marker, all others none.

    In doubt, one or none is right. An entry without a message is a disagreement as well.
    """
    accepted = Counter(entry["marker"] for entry in ledger)
    duplicates = sum(n - 1 for n in accepted.values())
    disagreements = unknown = 0
    for row in rows:
        times = accepted.pop(row["id"], 0)
        if row["state"] == State.UNKNOWN:
            unknown += times > 0
            disagreements += times > 1
        else:
            disagreements += times != (row["state"] == State.SENT)
    return Verdict(duplicates, disagreements + sum(accepted.values()), unknown)
