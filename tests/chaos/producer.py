"""A producer of the chaos run, a process of its own: calls enqueue, and keeps a journal of it.

    python -m tests.chaos.producer CALLS JOURNAL SEED SECONDS

What is about to be done is on the disk before it is done, and what came of it before anything
else is. So whatever kills the producer, its journal says what was accepted, and the next process
with the same journal goes on where it ended.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from worker import Client, Message
from worker.model import IdempotencyConflict, InboxFull, Unavailable

#: Of a hundred calls, so many are made again although they succeeded, so many with other content,
#: and so many of those that a kill interrupted are never finished.
REPEATED, CONFLICTING, ABANDONED = 30, 5, 20


class Journal:
    """Lines of JSON, each on the disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self.known = read_journal(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        for line in self.known:  # without the half line that a kill may have left
            self._append(line)

    def write(self, do: str, key: str, **more: Any) -> None:
        self._append({"do": do, "key": key, "at": time.time(), **more})

    def _append(self, line: Mapping[str, Any]) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")
        os.fsync(self._file)

    def has(self, do: str, key: str) -> bool:
        return any(line["do"] == do and line["key"] == key for line in self.known)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none where there is no file yet."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def address(key: str, row: int) -> str:
    """The recipient of one row; no two rows of a run have the same."""
    return f"{key}-r{row}@example.org"


def subject(key: str, row: int) -> str:
    """The subject of one row, as first enqueued."""
    return f"first {key} {row}"


def some_messages(call: Mapping[str, Any], word: str = "first") -> Iterator[Message]:
    for row in range(1, call["rows"] + 1):
        yield Message(
            address(call["key"], row), subject=f"{word} {call['key']} {row}", text="Hello."
        )


def main(words: list[str]) -> int:
    calls = json.loads(Path(words[0]).read_text())
    journal, seed, seconds = Journal(Path(words[1])), words[2], float(words[3])
    client = Client.from_env()
    for call in calls:
        if not journal.has("done", call["key"]):
            make(client, journal, call, random.Random(f"{seed} {call['key']}"))
            journal.write("done", call["key"])
            time.sleep(seconds / len(calls))
    journal.write("end", "")
    return 0


def make(client: Client, journal: Journal, call: dict[str, Any], chance: random.Random) -> None:
    """One call, until it has succeeded; perhaps the same again; perhaps with other content."""
    key = call["key"]
    repeats, conflicts, gives_up = (
        chance.random() * 100 < percent for percent in (REPEATED, CONFLICTING, ABANDONED)
    )
    if journal.has("abandoned", key):
        return
    if journal.has("call", key) and not journal.has("receipt", key) and gives_up:
        journal.write("abandoned", key)
        return
    if not journal.has("receipt", key):
        enqueue(client, journal, call, "receipt")
    if repeats:
        enqueue(client, journal, call, "again")
    if conflicts:
        enqueue(client, journal, call, "conflict")


def enqueue(client: Client, journal: Journal, call: dict[str, Any], do: str) -> None:
    """Calls until there is an answer, which is written down as `do`."""
    target = {name: call[name] for name in ("pool", "sender") if name in call}
    word = "other" if do == "conflict" else "first"
    while True:
        journal.write("call", call["key"], rows=call["rows"], word=word)
        try:
            receipt = client.enqueue(
                some_messages(call, word), idempotency_key=call["key"], name=call["key"], **target
            )
        except (Unavailable, InboxFull) as error:
            journal.write("refused", call["key"], error=type(error).__name__)
            time.sleep(0.2)
        except IdempotencyConflict:
            journal.write(do, call["key"], conflict=True)
            return
        else:
            journal.write(
                do, call["key"], batch=receipt.batch_id, accepted=receipt.accepted,
                duplicates=receipt.duplicates,
            )  # fmt: skip
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
