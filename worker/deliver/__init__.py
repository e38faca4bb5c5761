"""The lane: one mailbox being worked, from what is due to its audit rows."""

from worker.deliver.lane import Lane
from worker.deliver.values import Deps, Rules

__all__ = ["Deps", "Lane", "Rules"]
