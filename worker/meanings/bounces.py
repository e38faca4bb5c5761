"""What the enhanced status codes of non-delivery reports say: of an address, or of the sender.

https://learn.microsoft.com/exchange/mail-flow-best-practices/non-delivery-reports-in-exchange-online
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Kind(StrEnum):
    """What a report is about."""

    HARD = "hard"  #: the address: no mail will ever reach it
    SOFT = "soft"  #: this mail only: the next may arrive
    QUOTA = "quota"  #: the sender: what it sends now does not arrive


#: The address does not exist, has moved, or lies in a domain that is none.
_HARD = frozenset({
    "5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10", "5.4.310",
})  # fmt: skip
_SUBMISSION = "The sender has sent more than Exchange lets it."
_TENANT = "The organisation has sent more to others than Exchange lets it."
_SPAM = "Exchange takes this sender for a source of spam, and lets nothing out."
_QUOTA: Mapping[str, str] = {
    "5.1.8": _SPAM, "5.1.90": "The sender has written to too many recipients in 24 hours.",
    "5.2.2": _SUBMISSION, "5.7.232": _TENANT, "5.7.233": _TENANT, "5.7.236": _TENANT,
    "5.7.705": _SPAM, "5.7.708": _SPAM, "5.7.750": _SPAM,
}  # fmt: skip
#: Of these, what stops all mailboxes of the organisation alike.
_OF_TENANT = frozenset({"5.7.232", "5.7.233", "5.7.705", "5.7.708", "5.7.750"})
#: 5.2.2 is the recipient's mailbox, which is full, unless the report speaks of sending.
_OF_EITHER = "5.2.2"


def kind_of(code: str | None, *, submission: bool = False) -> Kind:
    """What a code is about. `submission`: the report speaks of a limit of sending."""
    if code in _QUOTA and (code != _OF_EITHER or submission):
        return Kind.QUOTA
    return Kind.HARD if code in _HARD else Kind.SOFT


def of_sender(code: str | None) -> bool:
    """Whether a mailbox that is suspended with this code waits for its limit to be over."""
    return code in _QUOTA


def of_tenant(code: str | None) -> bool:
    """Whether no other mailbox of the organisation can send either."""
    return code in _OF_TENANT


def to_resume(code: str | None, mailbox: str = "") -> str:
    """The command that lets a mailbox send again which was suspended for this code."""
    return f"postroom mailbox resume {'--all' if of_tenant(code) else mailbox}".rstrip()


def quota_reason(code: str | None) -> str:
    """Why a mailbox is suspended for such a report, and what helps."""
    said = _QUOTA.get(code or "", _SUBMISSION)
    return f"{said} Its mail is not delivered. When it may send again: {to_resume(code)}."
