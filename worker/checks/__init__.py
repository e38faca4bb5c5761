"""The door's checks: pure, all problems together, with row, code, place and what is allowed."""

from worker.checks.call import Call, check_call, check_key
from worker.checks.message import Checked, Rules, check
from worker.checks.template import check_template
from worker.checks.text import Refused

__all__ = [
    "Call", "Checked", "Refused", "Rules", "check", "check_call", "check_key", "check_template",
]  # fmt: skip
