"""A template as it is given to a call, before Jinja2 looks at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from worker.checks.message import GIVEN_AWAY, MOST_BODY
from worker.checks.text import Refused, body, shown
from worker.model import Template

_PARTS = ("subject", "html", "text")


def check_template(given: object, secrets: Sequence[str] = ()) -> dict[str, Any]:
    """The template as JSON: `{"subject", "html"?, "text"?}`. Raises Refused."""
    if isinstance(given, Template):
        given = {part: getattr(given, part) for part in _PARTS}
    if not isinstance(given, Mapping):
        raise Refused("TYPE", f"expected a Template, got {type(given).__name__}", "template")
    if unknown := [key for key in given if key not in _PARTS]:
        raise Refused("FIELD", f"unknown field {shown(unknown[0])}", "template")
    found = {part: _part(given[part], part) for part in _PARTS if given.get(part) is not None}
    if not found.get("subject"):
        raise Refused("SUBJECT_NONE", "a template needs a subject", "template.subject")
    if not found.get("html") and not found.get("text"):
        raise Refused("BODY_NONE", "give html or text", "template")
    for part, text in found.items():
        if any(secret in text for secret in secrets):
            raise Refused("SECRET_LIKE", GIVEN_AWAY, f"template.{part}")
    return found


def _part(given: object, part: str) -> str:
    try:
        return body(given, MOST_BODY, "BODY_LEN")
    except Refused as refused:
        raise Refused(refused.code, refused.detail, f"template.{part}") from None
