"""Staging: everything to one address, or nothing to strangers. Pure: content in, content out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

#: The code of a message whose recipient ALLOWED_DOMAINS does not allow.
RCPT_POLICY = "RCPT_POLICY"
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


NO_STAGING = Staging()


def addresses(content: Mapping[str, Any]) -> list[str]:
    """All addresses that a message goes to, in its order."""
    return [one["address"] for field in _FIELDS for one in content.get(field) or ()]


def stranger(address: str, allowed: Collection[str]) -> bool:
    """Whether the address lies outside the allowed domains; none given: all are allowed."""
    return bool(allowed) and address.rpartition("@")[2].lower() not in allowed


def staged(
    staging: Staging, content: Mapping[str, Any], subject: str
) -> tuple[Mapping[str, Any], str]:
    """Content and subject as they are to be sent: to REDIRECT_TO alone, where that is set.

    Its original recipients then stand before the subject.
    """
    if not staging.redirect_to:
        return content, subject
    original = addresses(content)
    more = f" +{len(original) - _NAMED}" if len(original) > _NAMED else ""
    told = f"[to {', '.join(original[:_NAMED])}{more}] {subject}"
    kept = {field: value for field, value in content.items() if field not in _FIELDS}
    return {**kept, "to": [{"address": staging.redirect_to}]}, told[:MOST_SUBJECT]


def refusal(staging: Staging, content: Mapping[str, Any]) -> str | None:
    """Why the message may not be sent from here; None where it may."""
    allowed = staging.allowed_domains
    bad = next((a for a in addresses(content) if stranger(a, allowed)), None)
    if bad is None:
        return None
    # Of the address only what the reason needs: details go into logs and audit.
    return f"the domain {bad.rpartition('@')[2][:64]} is not among ALLOWED_DOMAINS"
