"""Rows as one parameter, so that a statement has the same text for one and for a hundred."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    column,
    func,
    select,
    type_coerce,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.selectable import FromClause

from worker.store.schema import messages


def given(dialect: str, **columns: Any) -> FromClause:
    """The rows of the JSON parameter `rows` as a table, the same for both databases."""
    if dialect == "postgresql":
        names = [column(name, kind) for name, kind in columns.items()]
        call = func.jsonb_to_recordset(cast(bindparam("rows", type_=Text), JSONB))
        return call.table_valued(*names, name="given").render_derived(with_types=True)
    each = func.json_each(bindparam("rows", type_=Text)).table_valued("value", name="each")
    picked = [
        _as(kind, func.json_extract(each.c.value, f"$.{name}")).label(name)
        for name, kind in columns.items()
    ]
    return select(*picked).select_from(each).subquery("given")


def _as(kind: Any, found: ColumnElement[Any]) -> ColumnElement[Any]:
    """What SQLite's json_extract gives, which has types of its own, as this type."""
    if isinstance(kind, Boolean):
        return found == 1
    return type_coerce(found, kind) if isinstance(kind, JSON) else cast(found, kind)


def is_among(dialect: str, text: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """Whether a text is in the list that is the parameter `name`: one statement for any length.

    With IN each length would be a text of its own, to be made, taken apart and planned anew.
    """
    if dialect == "postgresql":
        return text == any_(bindparam(name, type_=postgresql.ARRAY(Text)))
    each = func.json_each(bindparam(name, type_=JSON)).table_valued("value")
    return text.in_(select(each.c.value))


def is_given(dialect: str, rows: FromClause) -> ColumnElement[bool]:
    """Whether a message is one of `rows`.

    PostgreSQL takes a hundred rows to come out of any JSON, and would rather read ten thousand
    messages from end to end than look up so many. It counts what is in an array.
    """
    same = messages.c.id == rows.c.id
    if dialect != "postgresql":
        return same
    ids = bindparam("ids", type_=postgresql.ARRAY(postgresql.UUID(as_uuid=False)))
    return and_(same, messages.c.id == any_(ids))


def array_of(rows: Iterable[str]) -> str:
    """The parameter `rows`: these JSON texts as one."""
    return f"[{','.join(rows)}]"


def rows_given(dialect: str, rows: Iterable[str], ids: Sequence[str]) -> dict[str, Any]:
    """The parameters of a statement that finds its rows, each a JSON text, by `is_given`."""
    found: dict[str, Any] = {"rows": array_of(rows)}
    if dialect == "postgresql":
        found["ids"] = list(ids)
    return found
