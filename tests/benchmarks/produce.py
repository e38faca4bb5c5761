"""A producer as a process of its own: enqueues by `worker.Client`, and says what it cost."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator

from tests.benchmarks.letters import HTML, SUBJECT, variables
from worker import Client, Message, Template


def main(order: dict) -> dict:
    """`order`: `to` (mailbox to count), `due` (ISO 8601, or null), `kilobytes` (of a body that each
    message has for itself; absent: a template); `one_by_one`: with a pause of so many seconds, each
    a batch of its own and urgent, and says when each began.
    """
    client = Client.from_env()
    if pause := order.get("one_by_one"):
        return {"began": [_urgent(client, order, pause) for _ in range(*order["to"].values())]}
    size = order.get("kilobytes")
    template = None if size else Template(SUBJECT, html=HTML)
    before, began = _used(), time.monotonic()
    batches = [
        client.enqueue(_messages(count, size), sender=mailbox, template=template,
                       send_at=order["due"], name=f"Invoices of {mailbox}").batch_id
        for mailbox, count in order["to"].items()
    ]  # fmt: skip
    return {
        "seconds": time.monotonic() - began, "processor": _used() - before, "batches": batches,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def _urgent(client: Client, order: dict, pause: float) -> float:
    time.sleep(pause)
    began = time.monotonic()
    [mailbox] = order["to"]
    one = Message("someone@fabrikam.com", subject="Your code", text="1234")
    client.enqueue([one], sender=mailbox, priority="high")
    return began


def _messages(count: int, size: int | None) -> Iterator[Message]:
    for address, values in variables(count):
        if size:
            yield Message(address, subject="Your letter", html=f"<p>{address:{size * 1000}}</p>")
        else:
            yield Message(address, variables=values)


def _used() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
