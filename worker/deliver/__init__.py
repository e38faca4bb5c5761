"""The lane: one mailbox being worked, from what is due to its audit rows."""

from worker.deliver.lane import Lane
from worker.deliver.standing import SUSPENDED
from worker.deliver.values import Deps, Rules

__all__ = ["SUSPENDED", "Deps", "Lane", "Rules"]
