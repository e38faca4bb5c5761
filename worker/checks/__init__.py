"""The door's checks: pure, all problems together, with row, code, place and what is allowed."""

from worker.checks.call import Call, check_call, check_key
from worker.checks.message import MOST_BODY, MOST_SUBJECT, Checked, Rules, check

__all__ = [
    "MOST_BODY", "MOST_SUBJECT", "Call", "Checked", "Rules", "check", "check_call", "check_key",
]  # fmt: skip
