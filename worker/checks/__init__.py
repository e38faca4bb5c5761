"""The door's checks: pure, all problems together, with row, code, place and what is allowed."""

from worker.checks.addresses import address, mailbox
from worker.checks.attachments import IN_REQUEST, Keep, check_size
from worker.checks.call import Call, check_call, check_key
from worker.checks.message import Checked, Rules, check
from worker.checks.template import check_template
from worker.checks.text import Refused, line

__all__ = [
    "IN_REQUEST", "Call", "Checked", "Keep", "Refused", "Rules", "address", "check", "check_call",
    "check_key", "check_size", "check_template", "line", "mailbox",
]  # fmt: skip
