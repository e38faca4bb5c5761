"""Microsoft Graph: requests that leave once, and what came back."""

from worker.graph.door import Graph
from worker.graph.payload import MARKER_PROPERTY, payload

__all__ = ["MARKER_PROPERTY", "Graph", "payload"]
