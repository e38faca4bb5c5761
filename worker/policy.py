"""What an answer of Graph means, and what we do about it. Pure: chance comes as an argument.

Two steps: `classify` turns an answer into an outcome by one table, `conclude` turns an outcome
into a verdict. Microsoft's rules: branch on the status and on the most specific known code,
never on the text; codes may appear at any time.
https://learn.microsoft.com/graph/errors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import assert_never

from worker.model import (
    Accepted,
    Answer,
    Blame,
    Blocked,
    NotSent,
    OnUnknown,
    Outcome,
    Rejected,
    State,
    Throttled,
    Unknown,
    Verdict,
)

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)

#: Our own code where the guard before the first byte refused (see graph.Graph.send).
LEASE_NEARLY_OVER = "LeaseNearlyOver"
#: The message's attachments have not arrived in SQL, or cannot be read from it now.
CONTENT_MISSING = "ContentMissing"
#: A draft may not be made: the application lacks a permission.
NEEDS_READ_WRITE = "NeedsMailReadWrite"
#: The message goes by a draft, of which a part is uploaded.
UPLOADING = "Uploading"
#: The gate had no room for the next request of an upload.
GATE_CLOSED = "GateClosed"
#: The mailbox was told to rest while the message was being claimed.
RESTING = "MailboxRests"
#: The message alone is more than a limit allows. Someone may raise the limit.
OVER_LIMIT = "OverLimit"
HELD_BACK = frozenset(
    {LEASE_NEARLY_OVER, CONTENT_MISSING, UPLOADING, GATE_CLOSED, RESTING, OVER_LIMIT}
)
#: A daily quota: it frees again in hours, not in seconds.
_QUOTA = "ErrorSubmissionQuotaExceeded"
#: Refusals that were seen to pass on a repeat, but are nearly always final: one repeat.
#: https://github.com/Azure/Microsoft365R/issues/110
_ONE_REPEAT = frozenset({"ErrorInvalidRecipients", "ErrorMissingRecipients"})

# ---- answers ------------------------------------------------------------------------------------

_Reading = Callable[[Answer], Outcome]
_token: _Reading = partial(Blocked, blame=Blame.TOKEN)
_mailbox: _Reading = partial(Blocked, blame=Blame.MAILBOX)
_passing: _Reading = partial(Rejected, passing=True)

#: These say all by themselves, whatever code comes with them. What is missing below 400 or from
#: 500 on is doubt: every 5xx, for a request may have been taken before the answer went wrong, and
#: every 2xx but the one that Graph gives, for somebody else answered it.
#: https://learn.microsoft.com/answers/questions/2286986 (504, four deliveries)
BY_STATUS: Mapping[int, _Reading] = {
    202: Accepted,
    **dict.fromkeys(range(300, 400), Rejected),  # no redirect is followed, so nobody took it
    401: _token,
    408: Unknown,
    429: Throttled,
}

#: Known codes, for the other statuses from 400 to 499.
#: https://learn.microsoft.com/graph/errors
#: https://learn.microsoft.com/exchange/client-developer/web-service-reference/responsecode
BY_CODE: Mapping[str, _Reading] = {
    **dict.fromkeys(
        (
            "ErrorAccessDenied",
            "Authorization_RequestDenied",
            "ErrorAccountDisabled",
            "ErrorAccountSuspend",
            "ErrorInvalidLicense",
            "ErrorOrganizationAccessBlocked",
            "ErrorMessageSubmissionBlocked",
            "ErrorMessageBlocked",
            "ErrorExceededMessageLimit",
            "ErrorExceededMaxRecipientLimit",
            "MailboxNotEnabledForRESTAPI",
            "ErrorMailboxNotEnabledForRESTAPI",
            "ErrorInvalidUser",
            "ErrorNonExistentMailbox",
            "Request_ResourceNotFound",
            "ResourceNotFound",
            "ErrorQuotaExceeded",
            "quotaLimitReached",
        ),
        _mailbox,
    ),
    "InvalidAuthenticationToken": _token,
    **dict.fromkeys(
        (
            _QUOTA,
            "ApplicationThrottled",
            "TooManyRequests",
            "activityLimitReached",
            "ErrorExceededConnectionCount",
        ),
        Throttled,
    ),
    # The message names a `from` that this mailbox may not use: another message may well pass.
    # https://learn.microsoft.com/graph/outlook-send-mail-from-other-user
    "ErrorSendAsDenied": Rejected,
    **dict.fromkeys(
        (
            "BadRequest",
            "ErrorInvalidParameter",
            "ErrorInvalidSmtpAddress",
            "ErrorMimeContentConversionFailed",
            "ErrorMimeContentInvalid",
            "ErrorMimeContentInvalidBase64String",
            "InvalidInternetMessageHeader",
            "InvalidInternetMessageHeaderCollection",
            "RequestBodyRead",
            "RequestEntityTooLarge",
            "ErrorMessageSizeExceeded",
            "ErrorAttachmentSizeLimitExceeded",
            "ErrorVirusDetected",
        ),
        Rejected,
    ),
    # Conflicts in Exchange's store and a misrouted request: the same message may pass later.
    **dict.fromkeys(
        (
            *_ONE_REPEAT,
            "ErrorIncorrectRoutingHint",
            "ErrorIrresolvableConflict",
            "ErrorStaleObject",
        ),
        _passing,
    ),
    # Troubles inside Exchange, normally with a 5xx. They leave the same doubt under a 4xx.
    **dict.fromkeys(
        (
            "ErrorInternalServerError",
            "ErrorInternalServerTransientError",
            "generalException",
            "ErrorServerBusy",
            "ErrorMailboxStoreUnavailable",
            "ErrorMailboxMoveInProgress",
            "ErrorMailboxFailover",
            "ErrorADUnavailable",
            "ErrorInsufficientResources",
            "serviceNotAvailable",
            "ErrorTimeoutExpired",
            "ErrorTooManyObjectsOpened",
            "ErrorNotEnoughMemory",
            "ErrorItemSave",
            "ErrorConnectionFailed",
        ),
        Unknown,
    ),
}

#: Without a known code, from 400 to 499; what is missing here is the message's own fault. Where a
#: mail is sent at once, a 404 can only mean the mailbox, for nothing else stands in the path.
BY_STATUS_ALONE: Mapping[int, _Reading] = {
    403: _mailbox,
    404: _mailbox,
    409: _passing,
    412: _passing,
}


#: A draft that is not there any more may have been sent by an earlier request.
#: https://github.com/microsoftgraph/msgraph-sdk-dotnet/issues/2947
_GONE = "ErrorItemNotFound"


def classify(answer: Answer, *, of_draft: bool = False) -> Outcome:
    """What an answer means. Total: every status and code has exactly one outcome.

    The status goes first; a code is asked only among refusals (400 to 499). No status line is
    doubt: only `graph` knows when a request has not left, and says NotSent itself. `of_draft`: the
    request was to send a draft, which stands in its path.
    """
    status = answer.status
    if status is None or (of_draft and status == 404 and answer.code == _GONE):
        return Unknown(answer)
    if status in BY_STATUS:
        return BY_STATUS[status](answer)
    if not 400 <= status < 500:
        return Unknown(answer)
    reading = BY_CODE.get(answer.code or "") or BY_STATUS_ALONE.get(status, Rejected)
    return reading(answer)


# ---- verdicts -----------------------------------------------------------------------------------


def conclude(
    outcome: Outcome,
    *,
    tries: int,
    doubt: bool,
    max_attempts: int,
    on_unknown: OnUnknown,
    jitter: float,
) -> Verdict:
    """What becomes of a message in `sending`.

    `tries` and `doubt` are the message's, as before this attempt; `jitter` lies in [0, 1).
    Doubt is never lowered here, and a message in doubt never ends as `failed`.
    """
    match outcome:
        case Accepted(answer):
            return Verdict(State.SENT, doubt=doubt, cooldown=answer.retry_after)
        case Throttled(answer):
            rest = _rest(answer, tries, jitter)
            return Verdict(State.QUEUED, delay=rest, doubt=doubt, cooldown=rest)
        case Blocked(answer, blame):
            # A mailbox that refuses is soon suspended, and said to be: the first repeats are quick.
            base = SECOND if blame is Blame.MAILBOX else 5 * SECOND
            rest = answer.retry_after or backoff(tries, jitter, base)
            cooldown = rest if blame is Blame.MAILBOX else None
            return Verdict(State.QUEUED, delay=rest, doubt=doubt, cooldown=cooldown)
        case NotSent(answer):
            wait = answer.retry_after
            rest = backoff(tries, jitter) if wait is None else wait
            # Without a connection the next message fares no better; what we ourselves hold back
            # says nothing about the mailbox.
            cooldown = None if answer.code in HELD_BACK else rest
            return Verdict(State.QUEUED, delay=rest, doubt=doubt, cooldown=cooldown)
        case Rejected(answer, passing):
            return _refused(answer, passing, tries, max_attempts, doubt, jitter)
        case Unknown(answer):
            return _in_doubt(answer, tries, max_attempts, on_unknown, jitter)
    assert_never(outcome)


def _rest(answer: Answer, tries: int, jitter: float) -> timedelta:
    """How long a throttled mailbox rests: from a second to an hour, as Graph said if it did.

    https://learn.microsoft.com/graph/throttling#best-practices-to-handle-throttling
    """
    if answer.retry_after is not None:
        return min(max(answer.retry_after, SECOND), HOUR)
    return HOUR if answer.code == _QUOTA else backoff(tries, jitter)


def _refused(
    answer: Answer, passing: bool, tries: int, max_attempts: int, doubt: bool, jitter: float
) -> Verdict:
    """A refusal worth repeating is repeated until the tries are used up; another one is the end.

    "The end" is `failed` where surely no copy went out, `unknown` where an earlier attempt may
    have sent one.
    """
    most = min(2, max_attempts) if answer.code in _ONE_REPEAT else max_attempts
    if passing and tries + 1 < most:
        return Verdict(State.QUEUED, backoff(tries, jitter), spends_try=True, doubt=doubt)
    end = State.UNKNOWN if doubt else State.FAILED
    return Verdict(end, spends_try=passing, doubt=doubt)


def _in_doubt(
    answer: Answer, tries: int, max_attempts: int, on_unknown: OnUnknown, jitter: float
) -> Verdict:
    """The mailbox rests; the message waits to be settled, or goes again where that was chosen."""
    rest = backoff(tries, jitter)
    cooldown = max(rest, answer.retry_after or rest)
    if on_unknown is OnUnknown.RESEND and tries + 1 < max_attempts:
        return Verdict(State.QUEUED, cooldown, spends_try=True, doubt=True, cooldown=cooldown)
    return Verdict(State.UNKNOWN, spends_try=True, doubt=True, cooldown=cooldown)


# ---- waiting ------------------------------------------------------------------------------------


def backoff(
    n: int, jitter: float, base: timedelta = SECOND, cap: timedelta = timedelta(minutes=5)
) -> timedelta:
    """The wait after `n` (from 0) earlier ones: `base` doubled `n` times, at most `cap`.

    The result lies in [w/2, w) with w = min(cap, base * 2**n), spread by `jitter` in [0, 1), so
    that those who failed together do not come back together.
    """
    most = min(cap, base * 2 ** min(max(n, 0), 20))
    spread: timedelta = most * ((1 + jitter) / 2)
    return spread


#: How long after a doubt, and then after each look, the next look into the mailbox comes.
LOOKS = (30 * SECOND, 120 * SECOND, 600 * SECOND, 1800 * SECOND, HOUR)


def look_after(looks: int) -> timedelta:
    """The wait for the next look after `looks` (from 0) earlier ones."""
    return LOOKS[min(max(looks, 0), len(LOOKS) - 1)]


def retry_after(value: str | None, date: str | None) -> timedelta | None:
    """The wait that a Retry-After asks for, at most an hour; None where it says nothing usable.

    Seconds (whole or with a fraction, as Graph was seen to send) or an HTTP date, which is held
    against the answer's own `Date` header because our clock may differ. None: absent, no number
    and no date, negative, NaN, infinite, a date without a readable `Date`, a date gone by.
    https://learn.microsoft.com/graph/throttling, https://www.rfc-editor.org/rfc/rfc9110#field.retry-after
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = _until(value, date)
    if not math.isfinite(seconds) or seconds < 0:
        return None
    return min(timedelta(seconds=min(seconds, 3600)), HOUR)


def _until(value: str, date: str | None) -> float:
    """Seconds between two HTTP dates, NaN where one of them cannot be read.

    Dates know whole seconds only: what they leave out is waited as well.
    """
    try:
        return (_instant(value) - _instant(date or "")).total_seconds() + 1
    except (ValueError, TypeError, OverflowError, IndexError):
        return math.nan


def _instant(text: str) -> datetime:
    """An HTTP date; one without a zone is meant in UTC. Raises ValueError and its like."""
    instant = parsedate_to_datetime(text)
    return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant
