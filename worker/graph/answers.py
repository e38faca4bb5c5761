"""What is kept of an answer: status, the most specific known code, ids, a line for people."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from email.utils import formatdate
from typing import Any

import aiohttp

from worker.model import Answer
from worker.policy import BY_CODE, retry_after

#: A signed token, and whatever is said to bear something.
_TOKEN = re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*|(?<=\bBearer )[\w.~+/=-]+")
#: What can be neither: no dot, no blank, no @.
_ONE_WORD = re.compile(r"[\w-]+")
_ADDRESS = re.compile(r"[^\s<>()'\":;,]+@[^\s<>()'\":;,]+")


def answer_of(
    response: aiohttp.ClientResponse, content: bytes, client_request_id: str, took: timedelta
) -> Answer:
    headers = response.headers
    errors = list(_errors(content)) if content else []
    request_id = headers.get("request-id") or _first(errors, "request-id")
    detail = _first(errors, "message")
    if 300 <= response.status < 400:
        detail = "Graph's address answered with a redirect, which is not followed"
    return Answer(
        status=response.status,
        code=_code(errors),
        detail=for_people(detail) if detail else None,
        request_id=for_people(request_id)[:100] if request_id else None,
        client_request_id=client_request_id,
        retry_after=retry_after(headers.get("retry-after"), headers.get("date") or formatdate()),
        duration=took,
    )


def _errors(content: bytes) -> Iterator[Mapping[str, Any]]:
    """`error` and its inner errors, outermost first; none where the body is of another shape.

    https://learn.microsoft.com/graph/errors; both spellings of innerError occur.
    """
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    while isinstance(error, dict):
        yield error
        error = error.get("innerError") or error.get("innererror")


def _code(errors: Sequence[Mapping[str, Any]]) -> str | None:
    """The innermost code that we know, else the outermost one."""
    codes = [c for e in errors if isinstance(c := e.get("code"), str) and c]
    known = [c for c in codes if c in BY_CODE]
    code = known[-1] if known else next(iter(codes), None)
    return for_people(code)[:100] if code else None


def _first(errors: Sequence[Mapping[str, Any]], key: str) -> str | None:
    return next((v for e in errors if isinstance(v := e.get(key), str) and v), None)


def for_people(text: str) -> str:
    """One line of at most 300 characters, without mail addresses and tokens."""
    if _ONE_WORD.fullmatch(text):  # as every request id is
        return text[:300]
    line = _TOKEN.sub("(token)", " ".join(text[:2000].split()))
    return _ADDRESS.sub("(address)", line)[:300]
