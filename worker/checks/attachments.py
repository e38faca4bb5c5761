"""The attachments of one message: names, types, sizes, and what may not be together."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Callable, Mapping
from typing import Any

from worker.checks.text import Refused, line, name, shown
from worker.model import Attachment

#: https://learn.microsoft.com/office365/servicedescriptions/exchange-online-service-description/exchange-online-limits
MOST_ATTACHMENTS = 250
#: Bytes of one attachment and of all of a message: what an upload session takes.
#: https://learn.microsoft.com/graph/outlook-large-attachments
MOST_SIZE = 150 * 1024 * 1024
#: Bytes of all attachments that go in one request; more goes by a draft and upload sessions.
IN_REQUEST = 3_000_000

_TYPE = re.compile(r"[A-Za-z0-9][\w!#$&^.+-]{0,126}/[A-Za-z0-9][\w!#$&^.+-]{0,126}\Z", re.ASCII)
_CONTENT_ID = re.compile(r"[!-;=?-~]{1,200}\Z")
#: Python's own table: what a machine has besides must not make another message of the same file.
_TYPES = mimetypes.MimeTypes()
_FIELDS = ("name", "content", "content_type", "content_id", "path")

#: Keeps the content of an attachment until it is known that it is needed: its SHA-256 and size.
#: Raises Refused.
Keep = Callable[[Attachment], tuple[str, int]]


def attachments(given: Any, keep: Keep) -> tuple[list[dict[str, Any]], list[Refused]]:
    """References `{"sha256", "name", "type", "size", "content_id"?}`, and what is wrong."""
    if not isinstance(given, list | tuple):
        detail = f"expected a list of Attachment, got {type(given).__name__}"
        return [], [Refused("TYPE", detail, "attachments")]
    if len(given) > MOST_ATTACHMENTS:
        detail = f"{len(given)} attachments, most is {MOST_ATTACHMENTS}"
        return [], [Refused("ATT_COUNT", detail, "attachments")]
    good: list[dict[str, Any]] = []
    bad: list[Refused] = []
    for number, one in enumerate(given):
        try:
            good.append(_checked(one, keep))
        except Refused as refused:
            bad.append(Refused(refused.code, refused.detail, f"attachments[{number}]"))
    return good, bad or _together(good)


def _together(all_of_them: list[dict[str, Any]]) -> list[Refused]:
    total = sum(one["size"] for one in all_of_them)
    if total > MOST_SIZE:
        detail = f"{_megabytes(total)} in all, most is {_megabytes(MOST_SIZE)}"
        return [Refused("ATT_TOTAL", detail, "attachments")]
    seen: set[str] = set()
    for content_id in (one["content_id"] for one in all_of_them if "content_id" in one):
        if content_id in seen:
            detail = f"the content id {shown(content_id)} is used twice"
            return [Refused("ATT_CID", detail, "attachments")]
        seen.add(content_id)
    return []


def _checked(given: Any, keep: Keep) -> dict[str, Any]:
    one = _attachment(given)
    called = _name(one.name)
    kind = _type(one.content_type, called)
    found = {"name": called, "type": kind}
    if one.content_id is not None:
        if not isinstance(one.content_id, str) or not _CONTENT_ID.match(one.content_id):
            detail = f"content id {shown(one.content_id)}: 1-200 visible characters, no < or >"
            raise Refused("ATT_CID", detail)
        found["content_id"] = one.content_id
    if (one.content is None) == (one.path is None):
        raise Refused("ATT_CONTENT", "give content= or path=, and not both")
    sha256, size = keep(one)
    return {"sha256": sha256, "size": size, **found}


def _attachment(given: Any) -> Any:
    if isinstance(given, Attachment):
        return given
    if not isinstance(given, Mapping):
        raise Refused("TYPE", f"expected an Attachment, got {type(given).__name__}")
    if unknown := [key for key in given if key not in _FIELDS]:
        known = ", ".join(_FIELDS)
        raise Refused("FIELD", f"unknown field {shown(unknown[0])}; known are {known}")
    return Attachment(**{"name": None, **given})


def _name(value: Any) -> str:
    try:
        text = name(value, "file name")
    except Refused as refused:
        raise _as("ATT_NAME", refused) from None
    if not text.strip() or text in {".", ".."}:
        raise Refused("ATT_NAME", "a file name is needed")
    if found := [character for character in "/\\" if character in text]:
        raise Refused("ATT_NAME", f"file name holds {found[0]!r}")
    return text


def _type(value: Any, called: str) -> str:
    if value is None:
        return _TYPES.guess_type(called)[0] or "application/octet-stream"
    try:
        text = line(value, 255, "ATT_CTYPE", "content type")
    except Refused as refused:
        raise _as("ATT_CTYPE", refused) from None
    if not _TYPE.match(text):
        raise Refused("ATT_CTYPE", f"{shown(text)} is no media type such as application/pdf")
    return text.lower()


def _as(code: str, refused: Refused) -> Refused:
    """The reason under the field's own code; what is no text at all stays so."""
    return refused if refused.code == "TYPE" else Refused(code, refused.detail)


def check_size(size: int) -> None:
    """Refuses what is empty or larger than any upload may be."""
    if not size:
        raise Refused("ATT_EMPTY", "the attachment is empty")
    if size > MOST_SIZE:
        raise Refused("ATT_SIZE", f"is {_megabytes(size)}, most is {_megabytes(MOST_SIZE)}")


def _megabytes(size: int) -> str:
    return f"{size / 1024 / 1024:.1f} MB"
