"""Microsoft Graph: requests that leave once, and what came back."""

from worker.graph.door import Graph
from worker.graph.payload import (
    MARKER_PROPERTY,
    as_json,
    file_attachment,
    message_of,
    payload,
)
from worker.graph.reports import Bounced, Reports
from worker.graph.wire import Reply

__all__ = [
    "MARKER_PROPERTY",
    "Bounced",
    "Graph",
    "Reply",
    "Reports",
    "as_json",
    "file_attachment",
    "message_of",
    "payload",
]
