"""Staging: everything to one address, or nothing to strangers. Pure: content in, content out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_FIELDS = ("to", "cc", "bcc")
MOST_SUBJECT = 255  # characters
#: So many of the original addresses are named in the subject.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Staging:
    """What keeps a test environment from writing to real people; empty where it is none."""

    redirect_to: str | None = None  #: all mail goes to this address
    allowed_domains: frozenset[str] = (
        frozenset()
    )  #: if any, in lower case: mail to others is refused

    def __bool__(self) -> bool:
        return bool(self.redirect_to or self.allowed_domains)

    def document(self) -> dict[str, Any] | None:
        """For `batch status`; None where this is no staging."""
        if not self:
            return None
        return {"redirect_to": self.redirect_to, "allowed_domains": sorted(self.allowed_domains)}

    def __str__(self) -> str:
        told = []
        if self.redirect_to:
            told.append(f"REDIRECT_TO: all mail goes to {self.redirect_to}")
        if self.allowed_domains:
            domains = ", ".join(sorted(self.allowed_domains))
            told.append(f"ALLOWED_DOMAINS: only mail to {domains} is sent")
        return "; ".join(told)


def addresses(content: Mapping[str, Any]) -> list[str]:
    """All addresses that a message goes to, in its order."""
    return [one["address"] for field in _FIELDS for one in content.get(field) or ()]


def stranger(address: str, allowed: Collection[str]) -> bool:
    """Whether the address lies outside the allowed domains; none given: all are allowed."""
    return bool(allowed) and address.rpartition("@")[2].lower() not in allowed


def redirected(
    content: Mapping[str, Any], subject: str, address: str
) -> tuple[Mapping[str, Any], str]:
    """The message to `address` alone, its original recipients in the subject."""
    original = addresses(content)
    more = f" +{len(original) - _NAMED}" if len(original) > _NAMED else ""
    told = f"[to {', '.join(original[:_NAMED])}{more}] {subject}"
    kept = {field: value for field, value in content.items() if field not in _FIELDS}
    return {**kept, "to": [{"address": address}]}, told[:MOST_SUBJECT]
