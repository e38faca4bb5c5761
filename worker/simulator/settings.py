"""What the simulator can be told: defaults, types and checks of every setting in one place."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from worker.simulator.hostile import MIX

_BOUNCE = re.compile(r"[^\s=]+=[45]\.\d{1,3}\.\d{1,3}")
RETRY_AFTER_FORMS = ("integer", "fraction", "date", "absent", "nonsense")


class SettingError(ValueError):
    """A setting that does not exist or cannot be; the text is one line for a person."""


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; times in seconds where the name does not say otherwise."""

    tenant_id: str = _setting("6f1d8c1e-3c1b-4c8e-9d6a-0a5d1c3f7b21", "tenant, a UUID")
    tenant_domain: str = _setting("contoso.onmicrosoft.com", "tenant by its verified domain")
    domains: tuple[str, ...] = _setting(
        ("contoso.com", "contoso.onmicrosoft.com"), "domains whose every address is a mailbox"
    )
    mailboxes: tuple[str, ...] = _setting((), "the only mailboxes that exist (none: any)")
    out_of_scope: tuple[str, ...] = _setting((), "mailboxes an access policy keeps from the app")
    send_as: tuple[str, ...] = _setting((), "addresses that any mailbox may put into `from`")
    client_id: str = _setting("2b0c7a54-9f0e-4a57-8a52-6d1f0e9b3c10", "the application")
    client_secret: str = _setting("simulated-client-secret", "its secret")
    secret_expired: bool = _setting(False, "answer that the secret has expired")
    client_disabled: bool = _setting(False, "answer that the application is disabled")
    certificate: str = _setting("", "PEM file with the public certificate for client assertions")
    federated: str = _setting("", "issuer and subject of a trusted assertion, a blank between")
    identity_header: str = _setting("", "header that opens /msi/token, as on Azure's platforms")
    token_lifetime: int = _setting(3599, "seconds a token lives")
    mail_send: bool = _setting(True, "Mail.Send is granted")
    mail_read: bool = _setting(True, "Mail.Read is granted")
    mail_read_write: bool = _setting(
        True, "Mail.ReadWrite is granted, for drafts; searches want Mail.Read"
    )
    latency_ms: str = _setting("0", "time to answer, milliseconds: 50 or 200-400")
    limits: bool = _setting(True, "hold the mailbox limits")
    concurrency: int = _setting(4, "requests of a mailbox at once")
    request_limit: int = _setting(10_000, "requests of a mailbox in a window")
    request_window: float = _setting(600.0, "seconds of that window")
    upload_limit: int = _setting(150_000_000, "bytes uploaded to a mailbox in a window")
    upload_window: float = _setting(300.0, "seconds of that window")
    retry_after: float = _setting(5.0, "seconds a mailbox rests after a 429 for concurrency")
    retry_after_form: str = _setting("integer", "Retry-After: " + ", ".join(RETRY_AFTER_FORMS))
    grace_ms: int = _setting(250, "calls this soon after a 429 are refused, not `too early`")
    drafts_seconds: float = _setting(0.0, "an accepted mail lies in Drafts so long")
    search_delay: float = _setting(0.0, "searches find a mail only after so long")
    bounces: tuple[str, ...] = _setting(
        (), "addresses or domains whose mail comes back, each with its code: gone.example=5.1.1"
    )
    bounce_seconds: float = _setting(0.0, "the report comes into the sender's Inbox so late")
    immutable_ids: bool = _setting(True, "an id that was asked for as immutable stays when sent")
    upload_lifetime: float = _setting(3600.0, "seconds an upload session lives")
    message_limit: int = _setting(150 * 1024 * 1024, "bytes of all attachments of a message")
    keep_mails: int = _setting(10_000, "mails kept with their whole content")
    hostile_percent: float = _setting(0.0, "so many of a hundred requests meet a misfortune")
    hostile_mix: tuple[str, ...] = _setting((), "which ones (none: all): " + ", ".join(MIX))
    seed: int = _setting(0, "seed of latency and of all that happens by chance")

    def __post_init__(self) -> None:
        self.latency()
        if self.retry_after_form not in RETRY_AFTER_FORMS:
            raise SettingError(f"retry_after_form: one of {', '.join(RETRY_AFTER_FORMS)}")
        if unknown := [name for name in self.hostile_mix if name not in MIX]:
            raise SettingError(f"hostile_mix: {unknown[0]!r} is none of {', '.join(MIX)}")
        if self.hostile_percent > 100:
            raise SettingError(f"hostile_percent: at most 100, not {self.hostile_percent:g}")
        if bad := [one for one in self.bounces if not _BOUNCE.fullmatch(one)]:
            raise SettingError(f"bounces: gone.example=5.1.1 or the like, not {bad[0]!r}")
        for name in ("concurrency", "request_limit", "token_lifetime"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}: at least 1, not {getattr(self, name)}")

    def latency(self) -> tuple[float, float]:
        """Least and most seconds to answer."""
        low, dash, high = self.latency_ms.partition("-")
        try:
            least, most = float(low), float(high if dash else low)
        except ValueError:
            least, most = -1.0, -1.0
        if not 0 <= least <= most < math.inf:
            raise SettingError(
                f"latency_ms: a number of milliseconds or a range such as 200-400, "
                f"not {self.latency_ms!r}"
            )
        return least / 1000, most / 1000

    def changed(self, changes: dict[str, Any]) -> Settings:
        """The settings with these changes.

        Values may be text, as on the command line, or of their type, as in JSON.

        Raises:
            SettingError: unknown name or unfit value.
        """
        return replace(self, **{name: _coerced(name, value) for name, value in changes.items()})


_DEFAULTS = {item.name: item.default for item in fields(Settings)}
HELP = {item.name: str(item.metadata["help"]) for item in fields(Settings)}
_WORDS = {"yes": True, "true": True, "on": True, "1": True}
_WORDS |= {"no": False, "false": False, "off": False, "0": False}


def _coerced(name: str, value: Any) -> Any:
    if name not in _DEFAULTS:
        raise SettingError(f"{name}: there is no such setting")
    default = _DEFAULTS[name]
    match default:
        case bool():
            return _boolean(name, value)
        case int() | float():
            return _number(name, value, whole=isinstance(default, int))
        case tuple():
            return _addresses(name, value)
        case _:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise SettingError(f"{name}: text is wanted, not {value!r}")
            return str(value)


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in _WORDS:
        return _WORDS[str(value).lower()]
    raise SettingError(f"{name}: yes or no, not {value!r}")


def _number(name: str, value: Any, *, whole: bool) -> int | float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf or (whole and number != int(number)):
        kind = "whole number" if whole else "number"
        raise SettingError(f"{name}: a {kind} from 0 up is wanted, not {value!r}")
    return int(number) if whole else number


def _addresses(name: str, value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise SettingError(f"{name}: a list with commas is wanted, not {value!r}")
    return tuple(item.strip().lower() for item in cast("list[str]", items) if item.strip())
