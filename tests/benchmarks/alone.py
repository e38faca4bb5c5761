"""msgraph-sdk and O365 alone: no queue, no store, no retry. Says what sending cost."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jinja2

from tests.benchmarks.letters import HTML, SUBJECT, variables
from tests.test_microsoft_clients import o365_account, sdk_client, sdk_message

WARM = 20
AT_ONCE = 16
_jinja = jinja2.Environment(autoescape=True)
_subject, _html = _jinja.from_string(SUBJECT), _jinja.from_string(HTML)


def main(order: dict) -> dict:
    """`order`: `kind` (sdk, o365), `count`, `mailboxes`."""
    there = SimpleNamespace(
        url=os.environ["POSTROOM_GRAPH_URL"], tenant_id=os.environ["POSTROOM_TENANT_ID"],
        client_id=os.environ["POSTROOM_CLIENT_ID"], ca_bundle=os.environ["POSTROOM_CA_BUNDLE"],
        client_secret=os.environ["POSTROOM_CLIENT_SECRET"],
    )  # fmt: skip
    if order["kind"] == "sdk":
        return asyncio.run(_sdk(there, order["count"], order["mailboxes"]))
    return _o365(there, order["count"], order["mailboxes"])


async def _sdk(there: Any, count: int, mailboxes: list[str]) -> dict:
    from msgraph.generated.models.email_address import EmailAddress
    from msgraph.generated.models.recipient import Recipient
    from msgraph.generated.users.item.send_mail.send_mail_post_request_body import (
        SendMailPostRequestBody,
    )

    trust = ssl.create_default_context(cafile=there.ca_bundle)
    async with (
        httpx.AsyncHTTPTransport(verify=trust) as transport,
        httpx.AsyncClient(transport=transport, base_url=f"{there.url}/v1.0") as http,
    ):
        client = sdk_client(there, http)

        async def send(letters: Iterator[tuple[int, str, dict]]) -> None:
            for n, address, values in letters:
                message = sdk_message(_subject.render(values))
                message.body.content = _html.render(values)
                message.to_recipients = [Recipient(email_address=EmailAddress(address=address))]
                body = SendMailPostRequestBody(message=message, save_to_sent_items=True)
                mailbox = mailboxes[n % len(mailboxes)]
                await client.users.by_user_id(mailbox).send_mail.post(body)

        await send(_letters(WARM))
        before, began = _used(), time.monotonic()
        shared = _letters(count)
        await asyncio.gather(*(send(shared) for _ in range(AT_ONCE)))
        return {"seconds": time.monotonic() - began, "processor": _used() - before}


def _o365(there: Any, count: int, mailboxes: list[str]) -> dict:
    os.environ["REQUESTS_CA_BUNDLE"] = there.ca_bundle
    os.chdir(Path(there.ca_bundle).parent)  # O365 leaves files where it runs
    account = o365_account(there)
    account.con.requests_delay = 0  # it would wait for 200 ms between two requests
    account.authenticate()
    boxes = [account.mailbox(resource=mailbox) for mailbox in mailboxes]

    def send(letters: Iterator[tuple[int, str, dict]]) -> None:
        for n, address, values in letters:
            mail = boxes[n % len(boxes)].new_message()
            mail.to.add(address)
            mail.subject, mail.body = _subject.render(values), _html.render(values)
            mail.send(save_to_sent_folder=True)

    send(_letters(WARM))
    before, began = _used(), time.monotonic()
    send(_letters(count))
    found = {"seconds": time.monotonic() - began, "processor": _used() - before}
    account.con.session.close()
    return found


def _letters(count: int) -> Iterator[tuple[int, str, dict]]:
    for n, (address, values) in enumerate(variables(count)):
        yield n, address, values


def _used() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
