"""The table of answers and the verdicts: pure, so that chance may look for a hole."""

import itertools
import math
import re
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.model import (
    TRANSITIONS,
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
from worker.policy import BY_CODE, HOUR, LEASE_NEARLY_OVER, backoff, classify, conclude, retry_after

waits = st.none() | st.timedeltas(min_value=timedelta(0), max_value=timedelta(hours=1))
answers = st.builds(
    Answer,
    status=st.none() | st.integers(100, 599),
    code=st.none() | st.sampled_from(sorted(BY_CODE)) | st.text(max_size=20),
    retry_after=waits,
)
outcomes: st.SearchStrategy[Outcome] = st.one_of(
    st.builds(Accepted, answers),
    st.builds(Throttled, answers),
    st.builds(Rejected, answers, st.booleans()),
    st.builds(Blocked, answers, st.sampled_from(Blame)),
    st.builds(NotSent, answers),
    st.builds(Unknown, answers),
)
situations = st.fixed_dictionaries(
    {
        "tries": st.integers(0, 50),
        "doubt": st.booleans(),
        "max_attempts": st.integers(1, 50),
        "on_unknown": st.sampled_from(OnUnknown),
        "jitter": st.floats(0, 1, exclude_max=True),
    }
)


def verdict(outcome: Outcome, **changes) -> Verdict:
    situation = {"tries": 0, "doubt": False, "max_attempts": 6, "on_unknown": OnUnknown.HOLD}
    return conclude(outcome, **{**situation, "jitter": 0.0, **changes})


def test_every_status_has_an_outcome_and_only_202_is_accepted():
    """Total over 100 to 599 (and beyond, which no server should send)."""
    for status in range(1000):
        outcome = classify(Answer(status=status))
        assert isinstance(outcome, Accepted) == (status == 202), status
    assert isinstance(classify(Answer(code="ServerDisconnectedError")), Unknown)


@pytest.mark.parametrize("code", [None, *sorted(BY_CODE), "SomethingNew"])
def test_whatever_the_code_a_server_error_is_doubt_and_a_202_is_sent(code):
    """The status goes first: a 5xx may have sent, and a 202 has."""
    for status in (408, *range(500, 600)):
        assert isinstance(classify(Answer(status=status, code=code)), Unknown), status
    assert isinstance(classify(Answer(status=202, code=code)), Accepted)
    assert isinstance(classify(Answer(status=429, code=code)), Throttled)
    unauthorized = classify(Answer(status=401, code=code))
    assert isinstance(unauthorized, Blocked)
    assert unauthorized.blame is Blame.TOKEN


#: graph-facts 4.4, row by row: what Graph and Exchange are known to answer to a send.
TABLE = """
400  ErrorMimeContentInvalidBase64String     Rejected
400  ErrorMimeContentInvalid                 Rejected
400  ErrorMimeContentConversionFailed        Rejected
400  InvalidInternetMessageHeader            Rejected
400  InvalidInternetMessageHeaderCollection  Rejected
400  ErrorInvalidRecipients                  Rejected passing
400  ErrorMissingRecipients                  Rejected passing
400  ErrorInvalidSmtpAddress                 Rejected
400  ErrorInvalidParameter                   Rejected
400  BadRequest                              Rejected
400  RequestBodyRead                         Rejected
400  ErrorIncorrectRoutingHint               Rejected passing
400  ErrorVirusDetected                      Rejected
401  InvalidAuthenticationToken              Blocked token
401  -                                       Blocked token
403  ErrorAccessDenied                       Blocked mailbox
403  ErrorSendAsDenied                       Rejected
403  ErrorAccountDisabled                    Blocked mailbox
403  ErrorAccountSuspend                     Blocked mailbox
403  ErrorInvalidLicense                     Blocked mailbox
403  ErrorOrganizationAccessBlocked          Blocked mailbox
403  Authorization_RequestDenied             Blocked mailbox
403  ErrorMessageSubmissionBlocked           Blocked mailbox
400  ErrorMessageSubmissionBlocked           Blocked mailbox
403  ErrorMessageBlocked                     Blocked mailbox
400  ErrorMessageBlocked                     Blocked mailbox
403  ErrorExceededMessageLimit               Blocked mailbox
400  ErrorExceededMaxRecipientLimit          Blocked mailbox
404  MailboxNotEnabledForRESTAPI             Blocked mailbox
404  ErrorMailboxNotEnabledForRESTAPI        Blocked mailbox
400  MailboxNotEnabledForRESTAPI             Blocked mailbox
404  ErrorInvalidUser                        Blocked mailbox
404  Request_ResourceNotFound                Blocked mailbox
404  ResourceNotFound                        Blocked mailbox
404  ErrorNonExistentMailbox                 Blocked mailbox
404  ErrorItemNotFound                       Blocked mailbox
404  ErrorItemNotFound of a draft            Unknown
408  -                                       Unknown
408  RequestTimeout                          Unknown
409  ErrorIrresolvableConflict               Rejected passing
412  ErrorIrresolvableConflict               Rejected passing
409  ErrorStaleObject                        Rejected passing
409  -                                       Rejected passing
413  RequestEntityTooLarge                   Rejected
413  ErrorMessageSizeExceeded                Rejected
413  ErrorAttachmentSizeLimitExceeded        Rejected
413  -                                       Rejected
429  ApplicationThrottled                    Throttled
429  TooManyRequests                         Throttled
429  activityLimitReached                    Throttled
429  ErrorExceededConnectionCount            Throttled
429  UnknownError                            Throttled
429  ErrorSubmissionQuotaExceeded            Throttled
429  -                                       Throttled
400  ErrorSubmissionQuotaExceeded            Throttled
500  ErrorInternalServerError                Unknown
500  ErrorInternalServerTransientError       Unknown
500  generalException                        Unknown
500  UnknownError                            Unknown
502  -                                       Unknown
503  ErrorServerBusy                         Unknown
503  ErrorMailboxStoreUnavailable            Unknown
503  ErrorMailboxMoveInProgress              Unknown
503  ErrorMailboxFailover                    Unknown
503  ErrorADUnavailable                      Unknown
503  ErrorInsufficientResources              Unknown
503  serviceNotAvailable                     Unknown
503  ApplicationThrottled                    Unknown
504  UnknownError                            Unknown
504  ErrorTimeoutExpired                     Unknown
507  ErrorQuotaExceeded                      Unknown
509  -                                       Unknown
413  ErrorQuotaExceeded                      Blocked mailbox
413  quotaLimitReached                       Blocked mailbox
400  ErrorTooManyObjectsOpened               Unknown
400  ErrorNotEnoughMemory                    Unknown
400  ErrorItemSave                           Unknown
400  ErrorConnectionFailed                   Unknown
400  ErrorServerBusy                         Unknown
400  NeverSeen                               Rejected
400  -                                       Rejected
403  NeverSeen                               Blocked mailbox
403  -                                       Blocked mailbox
404  -                                       Blocked mailbox
415  -                                       Rejected
422  -                                       Rejected
302  -                                       Rejected
101  -                                       Unknown
200  -                                       Unknown
204  -                                       Unknown
206  -                                       Unknown
-    ServerDisconnectedError                 Unknown
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines(), ids=lambda row: "-".join(row.split()))
def test_the_known_answers_mean_what_microsoft_says(row):
    """The table, by example. What a 5xx says it refused is doubt all the same."""
    status, code, expected = re.split(" {2,}", row)
    code, _, of_draft = code.partition(" of a ")
    known: dict[str, Any] = {}
    known["status"] = None if status == "-" else int(status)
    known["code"] = None if code == "-" else code
    outcome = classify(Answer(**known), of_draft=bool(of_draft))
    words = [type(outcome).__name__]
    if isinstance(outcome, Blocked):
        words.append(outcome.blame)
    if isinstance(outcome, Rejected) and outcome.passing:
        words.append("passing")
    assert " ".join(words) == expected


def test_a_draft_that_is_gone_is_the_only_doubt_that_the_path_makes():
    """Sending a draft reads every other answer as sending at once does."""
    for status, code in itertools.product(range(100, 600), [None, *sorted(BY_CODE)]):
        answer = Answer(status=status, code=code)
        assert classify(answer, of_draft=True) == classify(answer)


@given(outcome=outcomes, situation=situations)
def test_no_verdict_breaks_the_rules(outcome, situation):
    """What must hold for every outcome in every situation."""
    given_ = conclude(outcome, **situation)
    assert given_.state in TRANSITIONS[State.SENDING]
    assert given_.delay >= timedelta(0)
    assert given_.cooldown is None or timedelta(0) <= given_.cooldown <= HOUR
    assert given_.doubt or not situation["doubt"], "doubt is never lowered"
    assert not (given_.state is State.FAILED and given_.doubt), "nobody in doubt ends as failed"
    assert given_.doubt or given_.state is not State.UNKNOWN
    assert (given_.state is State.SENT) == isinstance(outcome, Accepted)
    if isinstance(outcome, Throttled | Blocked | NotSent):
        assert given_.state is State.QUEUED, "waiting is not failing"
        assert not given_.spends_try
        assert given_.delay > timedelta(0)
    if given_.state is State.QUEUED and given_.spends_try:
        assert situation["tries"] + 1 < situation["max_attempts"], "tries end"


@given(situation=situations)
def test_doubt_is_resent_only_by_choice(situation):
    """Nothing is sent twice behind anyone's back."""
    given_ = conclude(Unknown(Answer(status=504)), **situation)
    assert given_.doubt
    assert given_.spends_try
    if situation["on_unknown"] is not OnUnknown.RESEND:
        assert given_.state is State.UNKNOWN
    assert given_.cooldown, "the mailbox rests, so that an outage parks a handful"


def test_resending_stops_at_the_last_try():
    """With RESEND a message goes again until its tries are used up, then it is held."""
    again = {"on_unknown": OnUnknown.RESEND, "max_attempts": 3}
    states = [verdict(Unknown(Answer()), tries=n, **again).state for n in range(4)]
    assert states == [State.QUEUED, State.QUEUED, State.UNKNOWN, State.UNKNOWN]


def test_a_refusal_worth_repeating_is_repeated_and_no_recipients_only_once():
    """ErrorInvalidRecipients passed on a repeat for some, but mostly means what it says."""
    conflict = Rejected(Answer(status=409), passing=True)
    assert [verdict(conflict, tries=n, max_attempts=3).state for n in range(3)] == [
        State.QUEUED, State.QUEUED, State.FAILED,
    ]  # fmt: skip
    nobody = Rejected(Answer(status=400, code="ErrorInvalidRecipients"), passing=True)
    assert [verdict(nobody, tries=n).state for n in range(2)] == [State.QUEUED, State.FAILED]
    assert verdict(nobody, max_attempts=1).state is State.FAILED
    assert verdict(Rejected(Answer(status=400)), doubt=True).state is State.UNKNOWN


@pytest.mark.parametrize(
    ("asked", "code", "rest"),
    [
        (timedelta(0), None, 1.0),
        (timedelta(milliseconds=2128), None, 2.128),
        (timedelta(hours=9), None, 3600.0),
        (None, None, 0.5),
        (None, "ErrorSubmissionQuotaExceeded", 3600.0),
        (timedelta(seconds=7), "ErrorSubmissionQuotaExceeded", 7.0),
    ],
)
def test_a_throttled_mailbox_rests_as_graph_says(asked, code, rest):
    """Between a second and an hour; a quota takes an hour where Graph does not say."""
    given_ = verdict(Throttled(Answer(status=429, code=code, retry_after=asked)))
    assert given_.delay == given_.cooldown == timedelta(seconds=rest)


def test_a_202_with_retry_after_is_sent_and_cools_the_mailbox():
    """An SDK that retried it made duplicates: github.com/microsoftgraph/msgraph-sdk-java #1487."""
    given_ = verdict(Accepted(Answer(status=202, retry_after=timedelta(seconds=10))))
    assert (given_.state, given_.cooldown) == (State.SENT, timedelta(seconds=10))


def test_only_a_mailbox_at_fault_cools_down():
    """A refused token is no mailbox's fault, nor is our own guard."""
    assert verdict(Blocked(Answer(status=403), Blame.MAILBOX)).cooldown
    assert verdict(Blocked(Answer(status=401), Blame.TOKEN)).cooldown is None
    assert verdict(NotSent(Answer(code="ClientConnectorError"))).cooldown
    assert verdict(NotSent(Answer(code=LEASE_NEARLY_OVER))).cooldown is None


@given(n=st.integers(-5, 10_000), jitter=st.floats(0, 1, exclude_max=True))
def test_the_backoff_stays_in_its_range(n, jitter):
    """Half to the whole of the doubled base, never over the cap."""
    base, cap = timedelta(seconds=2), timedelta(minutes=1)
    whole = min(60.0, 2.0 * 2 ** min(max(n, 0), 20))
    wait = backoff(n, jitter, base, cap).total_seconds()
    assert whole / 2 <= wait <= whole
    assert backoff(n, 0.0, base, cap) <= backoff(n + 1, 0.0, base, cap)


DATE = "Wed, 21 Oct 2026 07:28:00 GMT"


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        (None, DATE, None),
        ("17", None, 17),
        ("2.128", None, 2.128),
        (" 3 ", None, 3),
        ("0", None, 0),
        ("1e9", None, 3600),
        ("1000000000", None, 3600),
        ("-1", None, None),
        ("nan", None, None),
        ("inf", None, None),
        ("-inf", None, None),
        ("soon", None, None),
        ("", None, None),
        ("Wed, 21 Oct 2026 07:28:30 GMT", DATE, 31),
        ("Wed, 21 Oct 2026 09:28:30 -0000", "Wed, 21 Oct 2026 09:28:00 GMT", 31),
        ("Thu, 22 Oct 2026 07:28:30 GMT", DATE, 3600),
        ("Wed, 21 Oct 2026 07:27:00 GMT", DATE, None),
        ("Wed, 21 Oct 2026 07:28:30 GMT", None, None),
        ("Wed, 21 Oct 2026 07:28:30 GMT", "yesterday", None),
        ("Wed, 99 Oct 2026 07:28:30 GMT", DATE, None),
    ],
)
def test_every_form_of_retry_after_is_read(value, date, seconds):
    """Seconds, fractions and dates are seen in the wild; nonsense is as good as absent."""
    expected = None if seconds is None else timedelta(seconds=seconds)
    assert retry_after(value, date) == expected


@given(st.text() | st.floats().map(str) | st.integers().map(str), st.none() | st.text())
def test_no_retry_after_is_too_strange(value, date):
    """Any text gives None or a wait from zero to an hour."""
    wait = retry_after(value, date)
    assert wait is None or timedelta(0) <= wait <= HOUR
    assert wait is None or math.isfinite(wait.total_seconds())
