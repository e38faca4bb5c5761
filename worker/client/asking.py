"""What the client asks of SQL and Redis, and what it says where they do not answer."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from worker.model import NotFound, Unavailable

if TYPE_CHECKING:
    from worker.runtime import Runtime


def ask(question: Callable[[], Any], batch_id: str | None = None) -> Any:
    """What SQL answers. Raises Unavailable where it does not."""
    try:
        return question()
    except SQLAlchemyError as error:
        what = f"the database does not answer ({type(error).__name__})"
        raise Unavailable(what, batch_id) from error


def known_id(given: object, what: str = "batch") -> str:
    """An id in its usual form. Raises NotFound: nothing has an id of another form."""
    try:
        return str(uuid.UUID(given))  # type: ignore[arg-type]
    except (ValueError, AttributeError, TypeError):
        raise NotFound(f"a {what} id is a UUID") from None


def is_pool(rt: Runtime, name: str, batch_id: str) -> bool:
    """Whether the settings or SQL know this pool. Raises Unavailable."""
    if name in rt.settings.pools or rt.settings.database_url is None:
        return name in rt.settings.pools
    return name in ask(rt.store.mailboxes.pools, batch_id)
