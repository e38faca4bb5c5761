"""How values of settings are written and read: durations, files, and what is wrong with one."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, SecretStr
from pydantic_settings import NoDecode

from worker.model import InvalidSettings

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d)?\s*$", re.IGNORECASE)
_DOMAIN = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)+\Z")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def duration(text: Any) -> timedelta:
    """`90`, `90s`, `5min`, `24h`, `30d` as a timedelta; a bare number is seconds."""
    if isinstance(text, timedelta):
        return text
    match = _DURATION.match(str(text))
    if not match:
        raise ValueError("give a duration such as 90s, 5min or 24h")
    return timedelta(seconds=float(match[1]) * _UNITS[(match[2] or "s").lower()])


def domains(text: Any) -> frozenset[str]:
    """`example.com, example.org` in lower case."""
    given = text.split(",") if isinstance(text, str) else text
    found = frozenset(one.strip().lower().removeprefix("@") for one in given if one.strip())
    if bad := next((one for one in found if not _DOMAIN.match(one)), None):
        raise ValueError(f"{bad[:64]!a} is no domain; give e.g. example.com,example.org")
    return found


Duration = Annotated[timedelta, NoDecode]
Domains = Annotated[frozenset[str], NoDecode]
Switch = Literal["off", "on"]


def read(name: str, value: SecretStr | None, file: Path | None) -> str | None:
    """The value, or what its file holds; None where neither is set. Raises InvalidSettings."""
    if value is not None:
        return value.get_secret_value().strip()
    if file is None:
        return None
    return read_bytes(name, file).decode(errors="replace").strip()


def read_bytes(name: str, file: Path) -> bytes:
    """What the file holds. Raises InvalidSettings, which names the setting and no path."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidSettings(f"POSTROOM_{name}_FILE cannot be read: {error.strerror}") from None


def problem(error: Any) -> str:
    """One of pydantic's errors in our words."""
    name = "_".join(str(part) for part in error["loc"][:1]).upper() or "settings"
    return f"POSTROOM_{name}: {error['msg'].removeprefix('Value error, ')}"


def secrets_of(settings: BaseModel) -> tuple[str, ...]:
    """The secrets among the values, which no message may hold. Short ones may be words."""
    given = (value for _, value in settings)
    values = (one.get_secret_value().strip() for one in given if isinstance(one, SecretStr))
    return tuple(value for value in values if len(value) >= 16)
