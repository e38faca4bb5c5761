"""What codes mean in plain words, and what a person can do: Graph's and ours. Pure.

For reports, status and doctor. An unknown code has no entry: `meaning` then says what its status
or its kind says.
"""

from __future__ import annotations

from collections.abc import Mapping

from worker.meanings.entra import ENTRA
from worker.meanings.values import Meaning

_NO_RIGHT = Meaning(
    "The application may not send from this mailbox.",
    "Grant Mail.Send and put the mailbox into its scope; changes take up to two hours.",
)
_NO_ACCOUNT = Meaning(
    "The sender's account is disabled, suspended or without a licence.",
    "Enable the account in Microsoft 365, or take the mailbox out of the pool.",
)
_NO_MAILBOX = Meaning(
    "There is no such mailbox in Exchange Online.",
    "Check the sender's address; it must be a mailbox and no group.",
)
_BLOCKED = Meaning(
    "Exchange blocks this mailbox from sending for now.",
    "Look at the mailbox under restricted entities in Microsoft Defender.",
)
_SENDER_FULL = Meaning("The sender's mailbox is full.", "Empty it, Sent Items above all.")
_TOKEN = Meaning(
    "Graph did not accept the application's token.", "Check the credential with: postroom doctor"
)
_THROTTLED = Meaning("Graph asked the mailbox to slow down.", "Nothing: it goes on by itself.")
_ADDRESS = Meaning(
    "Exchange does not accept an address of this message.", "Correct the address and send anew."
)
_MALFORMED = Meaning(
    "Graph does not accept the message as it is.", "See the detail in: postroom message show"
)
_HEADERS = Meaning(
    "Graph does not accept one of the message's own headers.", "Leave it out and send anew."
)
_TOO_LARGE = Meaning("The message is too large.", "Send it with smaller attachments.")
_CONFLICT = Meaning("Exchange was busy with the same item.", "Try again: postroom batch retry.")
_LOOK = "With Mail.Read Postroom looks by itself; else look into Sent Items."
_MAYBE = "whether the message was sent is not known."
_EXCHANGE = Meaning(
    f"Exchange had trouble of its own, and {_MAYBE}",
    _LOOK,
)
_NO_ANSWER = Meaning(
    f"The connection broke before Graph answered: {_MAYBE}",
    _LOOK,
)
_NO_CONNECTION = Meaning(
    "No connection to Graph could be made; nothing was sent.",
    "Check network, DNS, proxy and CA_BUNDLE of the workers.",
)
_TEMPLATE = Meaning(
    "The template could not be filled for this message.", "Mend template or data and send anew."
)

#: What to run where no worker runs.
START = "celery -A worker worker -P threads -c 32 -l INFO"

MEANINGS: Mapping[str, Meaning] = {
    # Graph and Exchange: https://learn.microsoft.com/graph/errors
    **dict.fromkeys(("ErrorAccessDenied", "Authorization_RequestDenied"), _NO_RIGHT),
    **dict.fromkeys(
        ("ErrorAccountDisabled", "ErrorAccountSuspend", "ErrorInvalidLicense"), _NO_ACCOUNT
    ),
    "ErrorOrganizationAccessBlocked": Meaning(
        "Microsoft blocks the whole organisation.", "Ask Microsoft's support."
    ),
    **dict.fromkeys(
        ("ErrorMessageSubmissionBlocked", "ErrorMessageBlocked", "ErrorExceededMessageLimit",
         "ErrorExceededMaxRecipientLimit"), _BLOCKED,
    ),
    **dict.fromkeys(
        ("MailboxNotEnabledForRESTAPI", "ErrorMailboxNotEnabledForRESTAPI"),
        Meaning("The mailbox is inactive, unlicensed or not in Exchange Online.",
                "License it, or move it to Exchange Online."),
    ),
    **dict.fromkeys(
        ("ErrorInvalidUser", "ErrorNonExistentMailbox", "Request_ResourceNotFound",
         "ResourceNotFound"), _NO_MAILBOX,
    ),
    **dict.fromkeys(("ErrorQuotaExceeded", "quotaLimitReached"), _SENDER_FULL),
    "InvalidAuthenticationToken": _TOKEN,
    "ErrorSubmissionQuotaExceeded": Meaning(
        "The mailbox has used up what it may send in a day.", "Wait, or add mailboxes to the pool."
    ),
    **dict.fromkeys(
        ("ApplicationThrottled", "TooManyRequests", "activityLimitReached",
         "ErrorExceededConnectionCount"), _THROTTLED,
    ),
    "ErrorSendAsDenied": Meaning(
        "The mailbox may not send as the address in from_.",
        "Grant Send As in Exchange, or leave from_ out.",
    ),
    **dict.fromkeys(
        ("ErrorInvalidRecipients", "ErrorMissingRecipients", "ErrorInvalidSmtpAddress"), _ADDRESS
    ),
    **dict.fromkeys(
        ("BadRequest", "ErrorInvalidParameter", "ErrorMimeContentConversionFailed",
         "ErrorMimeContentInvalid", "ErrorMimeContentInvalidBase64String", "RequestBodyRead"),
        _MALFORMED,
    ),
    **dict.fromkeys(
        ("InvalidInternetMessageHeader", "InvalidInternetMessageHeaderCollection"), _HEADERS
    ),
    **dict.fromkeys(
        ("RequestEntityTooLarge", "ErrorMessageSizeExceeded", "ErrorAttachmentSizeLimitExceeded"),
        _TOO_LARGE,
    ),
    "ErrorVirusDetected": Meaning("An attachment holds a virus.", "Clean it and send anew."),
    **dict.fromkeys(
        ("ErrorIncorrectRoutingHint", "ErrorIrresolvableConflict", "ErrorStaleObject"), _CONFLICT
    ),
    **dict.fromkeys(
        ("ErrorInternalServerError", "ErrorInternalServerTransientError", "generalException",
         "ErrorServerBusy", "ErrorMailboxStoreUnavailable", "ErrorMailboxMoveInProgress",
         "ErrorMailboxFailover", "ErrorADUnavailable", "ErrorInsufficientResources",
         "serviceNotAvailable", "ErrorTimeoutExpired", "ErrorTooManyObjectsOpened",
         "ErrorNotEnoughMemory", "ErrorItemSave", "ErrorConnectionFailed"), _EXCHANGE,
    ),
    **ENTRA,
    # The way to Graph: names of exceptions
    **dict.fromkeys(
        ("ReadTimeout", "ReadError", "RemoteProtocolError", "TimeoutError",
         "ServerDisconnectedError", "ClientOSError", "ConnectionResetError",
         "ServerTimeoutError"), _NO_ANSWER,
    ),
    **dict.fromkeys(
        ("ConnectError", "ConnectTimeout", "ClientConnectorError", "ClientConnectorDNSError",
         "ClientConnectorCertificateError", "ClientConnectorSSLError", "ConnectionTimeoutError"),
        _NO_CONNECTION,
    ),
    # Ours
    "LeaseExpired": Meaning(
        f"The worker that was sending it ended without a word: {_MAYBE}",
        _LOOK,
    ),
    "LeaseNearlyOver": Meaning(
        "It was too late to send safely; nothing was sent.", "Nothing: it is tried again."
    ),
    "ContentMissing": Meaning(
        "An attachment's content is not in the database yet; nothing was sent.",
        "Nothing: it is tried again. If it stays so, send the message anew.",
    ),
    "Uploading": Meaning(
        "Its attachments are being uploaded, piece by piece; nothing was sent yet.",
        "Nothing: it goes on.",
    ),
    "GateClosed": Meaning(
        "A limit of the mailbox was reached while uploading; nothing was sent yet.",
        "Nothing: it goes on when there is room.",
    ),
    "NeedsMailReadWrite": Meaning(
        "Attachments above 3 MB go by a draft, which the application may not make.",
        "Grant the application permission Mail.ReadWrite, then: postroom batch retry",
    ),
    "SAVE_DRAFT": Meaning(
        "It goes by a draft, which Graph always keeps in Sent Items.",
        "Allow the copy (save_to_sent_items), or make the message smaller.",
    ),
    "Quarantined": Meaning(
        f"Three workers ended while sending it, so it is set aside: {_MAYBE}",
        "Have a look at the message before it is queued again.",
    ),
    "Expired": Meaning(
        "It could not be sent before its time was over.", "Send anew if it still matters."
    ),
    "Suppressed": Meaning(
        "The recipient is not to be written to.", "See: postroom suppress list"
    ),
    "RCPT_POLICY": Meaning(
        "The recipient's domain is not among ALLOWED_DOMAINS.", "This is a test environment."
    ),
    **dict.fromkeys(
        ("TPL_VAR_MISSING", "TPL_RENDER", "TPL_UNSAFE", "TPL_SYNTAX", "SUBJECT_LEN", "BODY_LEN"),
        _TEMPLATE,
    ),
}  # fmt: skip

_BY_STATUS: Mapping[int, Meaning] = {
    401: _TOKEN, 403: _NO_RIGHT, 404: _NO_MAILBOX, 408: _NO_ANSWER, 413: _TOO_LARGE,
    429: _THROTTLED, 507: _SENDER_FULL, 509: _THROTTLED,
}  # fmt: skip


def known(code: str) -> bool:
    """Whether more is known of this code than its kind."""
    return code in MEANINGS


def meaning(code: str | None, status: int | None = None) -> Meaning:
    """What a code means; for an unknown one, what its HTTP status does. Always something."""
    code, status = code or "", status or 0
    if found := MEANINGS.get(code) or _BY_STATUS.get(status):
        return found
    if code.startswith("AADSTS"):
        return Meaning("Entra did not give the application a token.", "See: postroom doctor")
    if status >= 500:
        return _EXCHANGE
    if status >= 400:
        return _MALFORMED
    return Meaning("No more is known than the code.", "See: postroom message show")
