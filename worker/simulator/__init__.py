"""A Graph and Entra of one's own, over TLS: an independent witness for tests and the demo.

It imports nothing else of the worker, so it cannot share a mistake with it.
"""

from worker.simulator.command import main
from worker.simulator.starter import Simulator

__all__ = ["Simulator", "main"]
