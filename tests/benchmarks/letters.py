"""The mails that all benchmarks send: short notifications of about 500 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SUBJECT = "Invoice {{ number }} of {{ date }}"
HTML = """<p>Dear {{ name }},</p>
<p>your invoice <b>{{ number }}</b> of {{ date }} over {{ amount }} EUR is ready. You find it in
our <a href="https://portal.example.org/invoices/{{ number }}">portal</a>, together with all that
we sent you before. Please pay within fourteen days; if you have done so already, take this letter
as a receipt and do nothing more.</p>
<p>If anything about it is not as it should be, answer to this mail or call us on any working day
between nine and five.</p>
<p>With kind regards,<br>Contoso, accounts department</p>
"""


def variables(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """So many recipients, each with the variables of its letter."""
    for n in range(count):
        yield f"customer{n}@fabrikam.com", {
            "name": f"Customer {n}", "number": f"{n:07}", "date": "2026-11-25",
            "amount": f"{n % 900}.00",
        }  # fmt: skip
