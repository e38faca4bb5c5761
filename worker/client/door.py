"""The door of one enqueue call: all messages pass it, before any of them goes anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from worker import checks, templates
from worker.checks import Call, Checked
from worker.client.keeper import Keeper
from worker.client.spool import Spool
from worker.csvfile import CsvFile
from worker.model import InvalidMessages, Message, Problem

#: So many problems of a refused call are kept; the last one says how many more there are.
MOST_PROBLEMS = 1000


@dataclass(slots=True)
class Review:
    """What a dry run found."""

    rows: int = 0
    problems: list[Problem] = field(default_factory=list)  #: as `enqueue` would raise them
    bad: int = 0  #: rows with a problem
    first: list[templates.Rendered] = field(default_factory=list)
    to: list[list[str]] = field(default_factory=list)  #: of these, the addresses in `to`


class Door:
    """Checks and serialises the messages of one call."""

    def __init__(
        self, call: Call, source: Mapping[str, Any] | None, compiled: templates.Compiled | None,
        rules: checks.Rules, keeper: Keeper | None = None, by: str = "api",
    ) -> None:  # fmt: skip
        self._call = call
        self._keeper = keeper
        self._source = source
        self._compiled = compiled
        self._rules = rules
        self._by = by

    def identity(self) -> bytes:
        """What makes two calls the same, besides their messages."""
        return _json({**self._call.header(), "template": self._source}).encode()

    def head(self, now: datetime) -> str:
        """What ingest needs to know of the batch."""
        call = self._call
        return _json({**call.header(), "name": call.name, "template": self._source,
                      "on_finished": call.on_finished, "max_failures": call.max_failures,
                      "by": self._by, "created_at": now.isoformat()})  # fmt: skip

    def check(self, row: int, given: object) -> Checked | list[Problem]:
        """One message, checked by itself and against the template."""
        found = checks.check(row, given, self._rules)
        if self._compiled is None or not isinstance(found, Checked):
            return found
        variables = found.content.get("variables") or {}
        wrong = self._compiled.unused(variables)
        try:
            self._compiled.check(variables, own_subject="subject" in found.content)
        except templates.TemplateProblem as problem:
            wrong.append(problem)
        return [Problem(row, p.code, p.path, p.detail) for p in wrong] or found

    def pass_through(self, messages: Any, spool: Spool, *, every: bool) -> list[Problem]:
        """Lays the good rows into the spool; gives what is wrong with the others.

        `every`: one problem for each refused row, however many; else all problems, of which the
        first thousand are kept and the last says how many more there are.
        """
        rejected: list[Problem] = []
        left_out, row = 0, 0
        for row, given in enumerate(self._rows(messages), start=1):
            found = self.check(row, given)
            if isinstance(found, Checked):
                spool.add(found.row)
                self._need(found)
                continue
            room = 1 if every else MOST_PROBLEMS - len(rejected)
            rejected += found[:room]
            left_out += 0 if every else max(0, len(found) - room)
        spool.flush()
        if not row:
            raise InvalidMessages([Problem(0, "EMPTY", "messages", "there is no message")])
        if left_out:
            rejected.append(Problem(0, "MORE", "messages", f"and {left_out} more problems"))
        return rejected

    def _rows(self, messages: Any) -> Iterator[object]:
        """A CSV may have more columns than the template asks for; other rows say what they mean."""
        if isinstance(messages, CsvFile) and self._compiled is not None:
            messages = messages.wanting(self._compiled.variables)
        return rows(messages)

    def _need(self, found: Checked) -> None:
        for one in found.content.get("attachments", ()):
            if self._keeper is not None:
                self._keeper.need(one["sha256"])

    def review(self, messages: Any, count: int) -> Review:
        """Checks all messages and renders the first `count` good ones; keeps nothing."""
        found, left_out = Review(), 0
        for row, given in enumerate(self._rows(messages), start=1):
            checked = self.check(row, given)
            found.rows = row
            if not isinstance(checked, Checked):
                room = MOST_PROBLEMS - len(found.problems)
                found.problems += checked[:room]
                left_out += max(0, len(checked) - room)
                found.bad += 1
            elif len(found.first) < count:
                found.first.append(templates.render(self._source, checked.content))
                found.to.append([one["address"] for one in checked.content.get("to") or ()])
        if not found.rows:
            raise InvalidMessages([Problem(0, "EMPTY", "messages", "there is no message")])
        if left_out:
            found.problems.append(Problem(0, "MORE", "messages", f"and {left_out} more problems"))
        return found


def rows(messages: Any) -> Iterator[object]:
    if isinstance(messages, Message):
        messages = [messages]
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        detail = f"expected messages, got {type(messages).__name__}"
        raise InvalidMessages([Problem(0, "TYPE", "messages", detail)])
    return iter(messages)


def open_template(
    given: object, secrets: Sequence[str]
) -> tuple[dict[str, Any] | None, templates.Compiled | None, list[Problem]]:
    if given is None:
        return None, None, []
    try:
        source = checks.check_template(given, secrets)
        return source, templates.compiled(source), []
    except checks.Refused as refused:
        return None, None, [Problem(0, refused.code, refused.path, refused.detail)]
    except templates.TemplateProblem as problem:
        return None, None, [Problem(0, problem.code, problem.path, problem.detail)]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
