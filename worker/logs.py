"""The form of the logs: for people, or JSON for programs; ids in each line, nothing personal.

Our own lines name messages and batches by their ids. What libraries put into an exception's text
(SQL's rows, addresses, tokens) is taken out here, whatever the form.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

#: What a record may carry beside its text.
IDS = ("batch_id", "message_id", "mailbox")
_LOCAL = r"[\w.!#$%&*+/?^`{|}~-]+"
_ADDRESS = re.compile(rf"{_LOCAL}(?:'{_LOCAL})*@[\w-]+(?:\.[\w-]+)+")
_TOKEN = re.compile(r"\beyJ[\w-]+\.[\w-]+(\.[\w-]*)?")
#: PostgreSQL and SQLAlchemy quote the row in question; URLs carry passwords.
_ROW = re.compile(r"(?m)^(DETAIL|CONTEXT|\[parameters|\[SQL).*$")
_PASSWORD = re.compile(r"(://[^\s:/@]*:)[^\s@]+@")


def scrubbed(text: str) -> str:
    """A library's text without addresses, tokens, rows and passwords."""
    text = _ROW.sub(r"\1: (not logged)", _PASSWORD.sub(r"\1(password)@", text))
    return _TOKEN.sub("(token)", _ADDRESS.sub("(address)", text))


class ForPeople(logging.Formatter):
    """The usual form, with tracebacks scrubbed."""

    def formatException(self, ei: Any) -> str:
        """As logging's, scrubbed."""
        return scrubbed(super().formatException(ei))


class ForPrograms(ForPeople):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, text, ids, error."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        at = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "text": record.getMessage(),
        } | {name: value for name in IDS if (value := getattr(record, name, None))}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def dress(logger: logging.Logger, *, programs: bool) -> None:
    """Gives every handler of this logger the form; keeps the words that its own form began with."""
    for handler in logger.handlers:
        given = handler.formatter
        usual = given._fmt if given is not None else None
        handler.setFormatter(ForPrograms() if programs else ForPeople(usual))
