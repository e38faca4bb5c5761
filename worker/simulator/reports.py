"""Reports of non-delivery that come back into the sender's Inbox, in the shape of Exchange's own.

https://learn.microsoft.com/exchange/mail-flow-best-practices/non-delivery-reports-in-exchange-online
"""

from __future__ import annotations

import uuid
from typing import Any

from worker.simulator.settings import Settings

_EXCHANGE = "MicrosoftExchange329e71ec88ae4615bbc36ab6ce41109e"
_TEXTS = {
    "5.1.1": "RESOLVER.ADR.RecipNotFound; not found",
    "5.1.10": "RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP address lookup",
    "5.1.90": "Your message can't be sent because you've reached your daily limit for message "
    "recipients",
    "5.2.2": "STOREDRV.Deliver; mailbox full. The following information should help",
    "5.7.233": "Your message can't be sent because your tenant exceeded its daily limit for "
    "sending email to external recipients (tenant external recipient rate limit)",
}


def reports(row: dict[str, Any], settings: Settings) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each recipient whose mail comes back: the ledger-like row of its report, and its text."""
    codes = dict(one.split("=") for one in settings.bounces)
    found = []
    for recipient in row["recipients"]:
        address = recipient.lower()
        code = codes.get(address) or codes.get(address.rpartition("@")[2])
        if code:
            found.append(_report(row, address, code, settings))
    return found


def _report(
    row: dict[str, Any], address: str, code: str, settings: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    name = uuid.uuid4().hex
    text = _TEXTS.get(code, "not delivered")
    original = "\r\n".join(f"{name}: {value}" for name, value in row["headers"].items())
    body = (
        f"Your message to {address} couldn't be delivered.\r\n\r\n"
        "Diagnostic information for administrators:\r\n\r\n"
        f"Generating server: SIM0000001.simulator.prod.outlook.com\r\n\r\n{address}\r\n"
        f"Remote Server returned '550 {code} {text}'\r\n\r\n"
        "Original message headers:\r\n\r\n"
        "Received: from SIM0000002 (2603:10a6:10:1::1) by SIM0000001; 550 5.0.0 is not the code\r\n"
        f"From: <{row['mailbox']}>\r\nTo: {', '.join(row['recipients'])}\r\n"
        f"Subject: {row['subject']}\r\nMessage-ID: {row['internet_message_id']}\r\n{original}\r\n"
    )
    made = {
        "time": row["time"] + settings.bounce_seconds, "mailbox": row["mailbox"],
        "properties": {"String 0x001A": "REPORT.IPM.Note.NDR"},
        "subject": f"Undeliverable: {row['subject']}", "id": f"AAkALg{name}=",
        "internet_message_id": f"<{name}@simulator.prod.outlook.com>",
    }  # fmt: skip
    sender = {"address": f"{_EXCHANGE}@{settings.tenant_domain}", "name": "Microsoft Outlook"}
    return made, {
        "from": {"emailAddress": sender},
        "body": {"contentType": "text", "content": body},
        "internetMessageHeaders": [
            {"name": "Content-Type", "value": "multipart/report; report-type=delivery-status"},
            {"name": "In-Reply-To", "value": row["internet_message_id"]},
        ],
    }
