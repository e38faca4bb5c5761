"""Postroom: bulk notifications through Microsoft Graph.

Everything here is imported on use, so that `import worker` costs nothing: applications take
`Client`, `Message`, `Template`, `Attachment` and the errors; `celery -A worker` takes `app`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.client import Client
    from worker.model import (
        Attachment,
        IdempotencyConflict,
        InboxFull,
        InvalidMessages,
        Message,
        NotFound,
        PostroomError,
        Template,
        Unavailable,
        WrongState,
    )
    from worker.tasks import app

__all__ = [
    "Attachment",
    "Client",
    "IdempotencyConflict",
    "InboxFull",
    "InvalidMessages",
    "Message",
    "NotFound",
    "PostroomError",
    "Template",
    "Unavailable",
    "WrongState",
    "app",
]

_ROOMS = {"Client": "worker.client", "app": "worker.tasks"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'worker' has no attribute {name!r}")
    return getattr(import_module(_ROOMS.get(name, "worker.model")), name)


def __dir__() -> list[str]:
    return __all__
