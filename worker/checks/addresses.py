"""Mail addresses and recipients: strict, with a reason for every refusal.

Plain ASCII addresses take one expression, which holds RFC 5321's rules for them; email-validator
judges the domains (once each) and everything else.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from email_validator import EmailNotValidError, validate_email

from worker.checks.text import Refused, line, name, shown

#: https://learn.microsoft.com/office365/servicedescriptions/exchange-online-service-description/exchange-online-limits
MOST_RECIPIENTS = 500

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_PLAIN = re.compile(rf"(?=[^@]{{1,64}}@)(?=.{{3,254}}\Z){_ATOM}(?:\.{_ATOM})*@([A-Za-z0-9.-]+)\Z")
_DISPLAY = re.compile(r"<[^<>]*>\s*\Z")
_GUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", re.IGNORECASE)
#: Scripts that one word may mix: Japanese, Korean and Chinese with Latin.
_MIXABLE = {"LATIN", "CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO"}


def address(value: object) -> str:
    """The address as it goes to Graph: an international domain in its ASCII form."""
    if isinstance(value, str) and (plain := _PLAIN.match(value)):
        _domain(plain[1])
        return value
    return _unusual(value)


def recipients(given: Any, path: str) -> tuple[list[dict[str, str]], list[Refused]]:
    """One or many recipients as `[{"address", "name"?}]`, and what is wrong with the others."""
    if isinstance(given, str):
        try:
            return [{"address": address(given)}], []
        except Refused as refused:
            refused.path = path
            return [], [refused]
    good: list[dict[str, str]] = []
    bad: list[Refused] = []
    for where, one in _each(given, path):
        try:
            good.append(_recipient(one))
        except Refused as refused:
            refused.path = where
            bad.append(refused)
    return good, bad


def one_person(given: Any) -> dict[str, str]:
    """An address, a pair (name, address) or a mapping, and only one."""
    return _recipient(given)


def mailbox(value: object) -> str:
    """A sender, in lower case: the address (UPN) of a mailbox, or its GUID."""
    text = line(value, 254, "MBX_SYNTAX", "mailbox")
    if _GUID.match(text):
        return text.lower()
    try:
        if not set(text) & set("/?#%"):
            return address(text).lower()
    except Refused:
        pass
    raise Refused("MBX_SYNTAX", f"{shown(text)}: a mailbox must be an address (UPN) or a GUID")


def _each(given: Any, path: str) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if isinstance(given, Mapping) or _is_pair(given):
        return [(path, given)]
    if isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray):
        return [(f"{path}[{n}]", one) for n, one in enumerate(given)]
    return [(path, given)]


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(g, str) for g in given)


def _recipient(one: Any) -> dict[str, str]:
    if isinstance(one, str):
        return {"address": address(one)}
    if _is_pair(one):
        if _PLAIN.match(one[0]) and one[0].lower() != one[1].lower():
            raise Refused(
                "RCPT_PAIR", "a pair is (name, address); give several addresses as a list"
            )
        one = {"name": one[0], "address": one[1]}
    if not isinstance(one, Mapping):
        raise Refused("TYPE", f"expected an address or (name, address), got {shown(one)}")
    if unknown := [key for key in one if key not in {"name", "address"}]:
        raise Refused("FIELD", f"unknown field {shown(unknown[0])}; known are address and name")
    found = {"address": address(one.get("address"))}
    if one.get("name") is not None and (called := name(one["name"])):
        found["name"] = called
    return found


@lru_cache(maxsize=8192)
def _domain(text: str) -> str:
    """The domain in ASCII, judged by email-validator; the good ones are remembered."""
    labels = text.split(".")
    if not text:
        raise Refused("ADDR_DOMAIN", "domain is empty")
    if len(labels) == 1 and not text.lower().startswith("xn--"):
        raise Refused("ADDR_DOMAIN", "domain needs a dot")
    if not all(labels):
        raise Refused("ADDR_DOMAIN", "empty label in the domain")
    if not text.isascii():
        _refuse_mixed(labels)
    try:
        # `.test` is for tests, and every set-up has one first.
        found = validate_email(f"a@{text}", check_deliverability=False, test_environment=True)
    except EmailNotValidError:
        international = not text.isascii() or any(lb.lower().startswith("xn--") for lb in labels)
        if international:
            raise Refused("ADDR_IDNA", "domain is not valid IDNA2008") from None
        raise Refused("ADDR_DOMAIN", f"{shown(text)} is no domain for mail") from None
    return str(found.ascii_domain)


def _refuse_mixed(labels: Sequence[str]) -> None:
    for label in labels:
        scripts = {unicodedata.name(c, "?").split()[0] for c in label if c.isalpha()}
        if len(scripts) > 1 and not scripts <= _MIXABLE:
            raise Refused(
                "ADDR_MIXED", "domain mixes scripts; give the punycode form if this is meant"
            )


def _unusual(value: object) -> str:
    """What the expression did not take: a reason, or an address with an international domain."""
    text = line(value, 100_000, "ADDR_LEN", "address")
    _refuse_shape(text)
    local, _, domain = text.partition("@")
    if len(local) > 64:
        raise Refused("ADDR_LOCAL_LEN", f'part before "@" is {len(local)} characters, most is 64')
    if len(text) > 254:
        raise Refused("ADDR_LEN", f"address is {len(text)} characters, most is 254")
    if not local.isascii():
        raise Refused("ADDR_LOCAL", 'part before "@" must be plain ASCII')
    ascii_domain = _domain(domain)
    whole = f"{local}@{ascii_domain}"
    if not _PLAIN.match(whole):
        raise Refused("ADDR_SYNTAX", f"{shown(text)} is no address")
    return whole


def _refuse_shape(text: str) -> None:
    if not text.strip():
        raise Refused("ADDR_EMPTY", "address is empty")
    if _DISPLAY.search(text):
        raise Refused("ADDR_DISPLAY", "put the name into name=")
    if "@" not in text:
        raise Refused("ADDR_NO_AT", f'{shown(text)} has no "@"')
    if text.count("@") > 1:
        raise Refused("ADDR_SYNTAX", 'more than one "@"; give several addresses as a list')
    if any(character.isspace() for character in text):
        raise Refused("ADDR_SPACE", "space inside the address")
    if text.startswith("@"):
        raise Refused("ADDR_SYNTAX", 'nothing before "@"')
