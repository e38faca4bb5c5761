"""What messages carry beside text: variables (JSON) and headers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import SecretBytes, SecretStr

from worker.checks.text import Refused, body, line, shown
from worker.model import MARKER_HEADER

MOST_DEPTH = 32
MOST_VALUES = 10_000
MOST_TEXT = 1_000_000  # bytes
#: Graph takes five headers, and the marker is one of them.
MOST_HEADERS = 4

_HEADER = re.compile(r"[xX]-[A-Za-z0-9-]{1,60}\Z")
_RESERVED = ("x-microsoft-exchange-", "x-ms-", MARKER_HEADER)
_JWT = re.compile(r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+\Z")


def variables(given: Any) -> dict[str, Any]:
    """Template variables: names to what JSON can say, at most 32 levels deep."""
    if not isinstance(given, Mapping):
        raise Refused("TYPE", f"expected a mapping, got {type(given).__name__}")
    count = iter(range(MOST_VALUES))
    return _mapping(given, 1, count)


def headers(given: Any) -> dict[str, str]:
    """Own headers: up to four, whose names begin with x-.

    https://learn.microsoft.com/graph/api/resources/message (internetMessageHeaders)
    """
    if not isinstance(given, Mapping):
        raise Refused("TYPE", f"expected a mapping, got {type(given).__name__}")
    if len(given) > MOST_HEADERS:
        raise Refused(
            "HDR_MAX", f"at most {MOST_HEADERS}; Graph takes 5 and one is used for the marker"
        )
    found: dict[str, str] = {}
    for key, value in given.items():
        if not isinstance(key, str) or not _HEADER.match(key):
            raise Refused("HDR_NAME", f'{shown(key)}: x- and then letters, digits and "-" only')
        if key.lower().startswith(_RESERVED):
            raise Refused("HDR_RESERVED", f"{key} is reserved")
        if key.lower() in {k.lower() for k in found}:
            raise Refused("HDR_DUP", f"{key} is given twice")
        found[key] = line(value, 900, "HDR_LEN", "header value")
    return found


def _mapping(given: Mapping[Any, Any], depth: int, count: Iterator[int]) -> dict[str, Any]:
    found = {}
    for key, value in given.items():
        if not isinstance(key, str):
            raise Refused("TYPE", f"a name must be text, got {type(key).__name__}")
        try:
            body(key, MOST_TEXT, "VAR_LEN")
            found[key] = _value(value, depth, count)
        except Refused as refused:
            here = key if key.isidentifier() and len(key) <= 64 else shown(key)
            raise Refused(refused.code, refused.detail, f".{here}{refused.path}") from None
    return found


def _value(value: Any, depth: int, count: Iterator[int]) -> Any:
    if next(count, None) is None:
        raise Refused("VAR_COUNT", f"more than {MOST_VALUES} values")
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int | float | None):
        return _number(value)
    if depth >= MOST_DEPTH:
        raise Refused("DEPTH", f"deeper than {MOST_DEPTH} levels")
    if isinstance(value, Mapping):
        return _mapping(value, depth + 1, count)
    if isinstance(value, list | tuple):
        return [_value(one, depth + 1, count) for one in value]
    if isinstance(value, SecretStr | SecretBytes):
        raise Refused("SECRET", "a secret may not be part of a message")
    raise Refused("TYPE", f"{type(value).__name__} has no place in JSON; give it as text")


def _text(value: str) -> str:
    text = body(value, MOST_TEXT, "VAR_LEN")
    if text.startswith("eyJ") and _JWT.match(text):
        raise Refused("SECRET_LIKE", "value looks like a credential")
    return text


def _number(value: float | None) -> float | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise Refused("NUMBER", "a number of more than 63 bits; give it as text")
    elif not math.isfinite(value):
        raise Refused("NUMBER", f"{value} is not valid JSON")
    return value
