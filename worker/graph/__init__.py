"""Microsoft Graph: requests that leave once, and what came back."""

from worker.graph.door import Graph
from worker.graph.payload import MARKER_PROPERTY, file_attachment, payload

__all__ = ["MARKER_PROPERTY", "Graph", "file_attachment", "payload"]
