"""What Graph takes as a sendMail body: strict, after Microsoft's own metadata.

Names and types: https://learn.microsoft.com/graph/api/resources/message. The rules for headers
are the service's, not the metadata's.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from worker.simulator.answers import GraphError

Check = Callable[[str, Any], None]
LARGEST_BODY = 4 * 1024 * 1024
LARGEST_UPLOAD = 150 * 1024 * 1024
MOST_RECIPIENTS = 500
MOST_HEADERS = 5
_RECIPIENT_LISTS = ("toRecipients", "ccRecipients", "bccRecipients")
_PROPERTY_ID = re.compile(
    r"\w+ (\{[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\} (Name \S.*|Id 0x[0-9a-fA-F]+)"
    r"|0x[0-9a-fA-F]{1,4})"
)
_MEMBERS = {
    "contentType": ("text", "html"),
    "importance": ("low", "normal", "high"),
    "flagStatus": ("notflagged", "complete", "flagged"),
}


def read_send(body: bytes) -> tuple[dict[str, Any], bool]:
    """Message and saveToSentItems of a sendMail request in JSON.

    Raises:
        GraphError: as the service refuses it.
    """
    document = read_json(body)
    save: Any = True
    message: Any = None
    for name, value in document.items():
        match name[:1].lower() + name[1:]:  # the SDKs write the metadata's Message
            case "message":
                message = value
            case "saveToSentItems":
                save = value
            case _:
                raise _bad(f"The parameter '{name}' in the request payload is not a valid one.")
    if message is None:
        raise GraphError(400, "ErrorInvalidParameter", "The value of parameter Message is empty.")
    if str(save).lower() not in ("true", "false"):
        raise _bad("Cannot convert the value of 'SaveToSentItems' to Edm.Boolean.")
    check_message(message)
    return message, str(save).lower() == "true"


def check_message(message: Any) -> None:
    """Refuse what the service would refuse.

    Raises:
        GraphError: 400 with the service's code.
    """
    check_draft(message)
    check_recipients(message)


def check_draft(message: Any) -> None:
    """As `check_message`, but without recipients it is a draft all the same."""
    _fields("message", message, _MESSAGE)


def check_recipients(message: dict[str, Any]) -> None:
    """Refuse a message to nobody, and one to too many."""
    count = sum(len(message.get(name) or ()) for name in _RECIPIENT_LISTS)
    if count == 0:
        raise GraphError(400, "ErrorInvalidRecipients", "At least one recipient is not valid.")
    if count > MOST_RECIPIENTS:
        raise GraphError(
            400, "ErrorInvalidRecipients", f"{count} recipients; at most {MOST_RECIPIENTS}."
        )


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request."""
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise _bad("Unable to read JSON request payload.")
    return document


def check_attachment(attachment: dict[str, Any]) -> None:
    """Refuse an attachment that the service would refuse."""
    _attachments("attachment", [attachment])


def check_item(document: dict[str, Any]) -> dict[str, Any]:
    """The AttachmentItem of createUploadSession.

    https://learn.microsoft.com/graph/api/attachment-createuploadsession
    """
    item = document.get("AttachmentItem", document.get("attachmentItem"))
    if len(document) != 1 or item is None:
        raise _bad("The parameter AttachmentItem is wanted, and no other.")
    _fields("AttachmentItem", item, _ITEM)
    if item.get("attachmentType") != "file" or not item.get("name"):
        raise _bad("AttachmentItem: attachmentType file and a name are wanted.")
    if not 0 < (item.get("size") or 0) <= LARGEST_UPLOAD:
        raise GraphError(413, "ErrorAttachmentSizeLimitExceeded", "At most 150 MB are allowed.")
    return dict(item)


def recipients(message: dict[str, Any]) -> list[str]:
    """All addresses of to, cc and bcc."""
    return [
        recipient["emailAddress"]["address"]
        for name in _RECIPIENT_LISTS
        for recipient in message.get(name) or ()
    ]


def _bad(text: str) -> GraphError:
    return GraphError(400, "BadRequest", text)


def _fields(where: str, value: Any, shape: Mapping[str, Check]) -> None:
    if not isinstance(value, dict):
        raise _bad(f"{where}: an object is wanted.")
    for name, item in value.items():
        if name.startswith("@odata."):
            continue
        check = shape.get(name)
        if check is None:
            raise _bad(f"The property '{name}' does not exist on type of '{where}'.")
        check(f"{where}.{name}", item)


def _text(where: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise _bad(f"{where}: Edm.String is wanted.")


def _truth(where: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise _bad(f"{where}: Edm.Boolean is wanted.")


def _whole(where: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise _bad(f"{where}: Edm.Int64 is wanted.")


def _member(where: str, value: Any) -> None:
    allowed = _MEMBERS[where.rpartition(".")[2]]
    if value is not None and str(value).lower() not in allowed:
        raise _bad(f"{where}: {value!r} is not one of {', '.join(allowed)}.")


def _texts(where: str, value: Any) -> None:
    for item in _array(where, value):
        if not isinstance(item, str):
            raise _bad(f"{where}: Edm.String is wanted.")


def _array(where: str, value: Any) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise _bad(f"{where}: an array is wanted.")
    return value or []


def _address(where: str, value: Any) -> None:
    _fields(where, value, {"address": _text, "name": _text})
    address = value.get("address")
    if not isinstance(address, str) or "@" not in address.strip("@"):
        raise GraphError(400, "ErrorInvalidRecipients", f"{where}: {address!r} is not an address.")


def _recipient(where: str, value: Any) -> None:
    if value is not None:
        _fields(where, value, {"emailAddress": _address})
        if "emailAddress" not in value:
            raise GraphError(400, "ErrorInvalidRecipients", f"{where}: no emailAddress.")


def _recipients(where: str, value: Any) -> None:
    for item in _array(where, value):
        _recipient(where, item if item is not None else {})


def _object(**shape: Check) -> Check:
    def check(where: str, value: Any) -> None:
        if value is not None:
            _fields(where, value, shape)

    return check


def _headers(where: str, value: Any) -> None:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_HEADERS:
        raise GraphError(
            400,
            "InvalidInternetMessageHeaderCollection",
            f"Internet message headers: from 1 to {MOST_HEADERS} are allowed.",
        )
    for header in value:
        _fields(where, header, {"name": _text, "value": _text})
        name = str(header.get("name") or "")
        if not name.lower().startswith("x-") or header.get("value") is None:
            raise GraphError(
                400,
                "InvalidInternetMessageHeader",
                f"The internet message header name '{name}' should start with 'x-' or 'X-'.",
            )


def _properties(where: str, value: Any) -> None:
    for item in _array(where, value):
        _fields(where, item, {"id": _text, "value": _text})
        if not _PROPERTY_ID.fullmatch(str(item.get("id"))):
            raise GraphError(400, "ErrorInvalidProperty", f"{where}: id {item.get('id')!r}.")
        if not isinstance(item.get("value"), str):
            raise _bad(f"{where}: value: Edm.String is wanted.")


def _attachments(where: str, value: Any) -> None:
    for item in _array(where, value):
        _fields(where, item, _ATTACHMENT)
        if item.get("@odata.type") != "#microsoft.graph.fileAttachment":
            raise _bad(f"{where}: @odata.type must be #microsoft.graph.fileAttachment.")
        if not item.get("name"):
            raise _bad(f"{where}: name is missing.")
        try:
            base64.b64decode(item.get("contentBytes") or "", validate=True)
        except (ValueError, binascii.Error, TypeError):
            raise _bad(f"{where}.contentBytes: Edm.Binary is wanted.") from None


_time = _object(dateTime=_text, timeZone=_text)
_ATTACHMENT: Final[Mapping[str, Check]] = {
    "name": _text,
    "contentType": _text,
    "contentBytes": _text,
    "contentId": _text,
    "contentLocation": _text,
    "isInline": _truth,
}
_ITEM: Final[Mapping[str, Check]] = {
    "attachmentType": _text,
    "contentId": _text,
    "contentType": _text,
    "isInline": _truth,
    "name": _text,
    "size": _whole,
}
_MESSAGE: Final[Mapping[str, Check]] = {
    "attachments": _attachments,
    "bccRecipients": _recipients,
    "body": _object(content=_text, contentType=_member),
    "categories": _texts,
    "ccRecipients": _recipients,
    "flag": _object(
        completedDateTime=_time, dueDateTime=_time, startDateTime=_time, flagStatus=_member
    ),
    "from": _recipient,
    "importance": _member,
    "internetMessageHeaders": _headers,
    "internetMessageId": _text,
    "isDeliveryReceiptRequested": _truth,
    "isReadReceiptRequested": _truth,
    "replyTo": _recipients,
    "sender": _recipient,
    "singleValueExtendedProperties": _properties,
    "subject": _text,
    "toRecipients": _recipients,
}
