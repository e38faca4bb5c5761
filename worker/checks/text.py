"""Leaf checks of text: what may stand in a line, in a body, and what may be echoed."""

from __future__ import annotations

import re

#: The most of a refused value that is ever shown again.
ECHO = 64

_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BODY = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
_BREAKS = "\r\n\x0b\x0c\x85\u2028\u2029"


class Refused(Exception):
    """One value is refused: a code for programs, a sentence for people. Never leaves the door."""

    def __init__(self, code: str, detail: str, path: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail
        self.path = path


def shown(value: object) -> str:
    """`value` for a message: escaped and at most 64 characters; of what is no text, the type."""
    if not isinstance(value, str):
        return type(value).__name__
    text = ascii(str(value[:ECHO]))
    return text if len(text) <= ECHO else f"{text[: ECHO - 3]}..."


def line(value: object, most: int, code: str, what: str = "text") -> str:
    """A text of one line, at most `most` characters; longer is refused with `code`."""
    text = _text(value)
    if not text.isprintable():
        _refuse_in(_LINE, text, what)
    if len(text) > most:
        raise Refused(code, f"{what} has {len(text)} characters, most is {most}")
    return text


def body(value: object, most: int, code: str) -> str:
    """A text of many lines, at most `most` bytes in UTF-8; more is refused with `code`."""
    text = _text(value)
    if not text.isprintable():
        _refuse_in(_BODY, text, "text")
    # No character takes more than four bytes: short ones need no counting.
    if len(text) * 4 > most and (size := len(text.encode())) > most:
        raise Refused(code, f"is {size / 1e6:.1f} MB, most is {most / 1e6:.1f} MB")
    return text


def name(value: object, what: str = "name") -> str:
    """A display name: one line in which nothing overrides the direction of the text."""
    text = line(value, 255, "NAME_LEN", what)
    if not text.isprintable() and (found := _BIDI.search(text)):
        raise Refused("BIDI", f"{what} contains text-direction override U+{ord(found[0]):04X}")
    return text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Refused("TYPE", f"expected text, got {type(value).__name__}")
    return value


def _refuse_in(pattern: re.Pattern[str], text: str, what: str) -> None:
    found = pattern.search(text)
    if not found:
        return
    character = found[0]
    if "\ud800" <= character <= "\udfff":
        raise Refused("UNICODE", f"{what} has a lone surrogate at position {found.start()}")
    if character in _BREAKS:
        raise Refused("CTRL_CHAR", f"{what} contains a line break (header injection)")
    raise Refused("CTRL_CHAR", f"{what} contains control character U+{ord(character):04X}")
