"""Pages for people: self-contained HTML without scripts, safe to send around. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from worker.templates import Rendered


def preview_page(first: Sequence[Rendered], to: Sequence[Sequence[str]], rows: int) -> str:
    """The first messages as they would be sent."""
    shown = [{"to": ", ".join(its), "subject": one.subject, "html": one.html, "text": one.text}
             for one, its in zip(first, to, strict=True)]  # fmt: skip
    return _page("preview.html", messages=shown, rows=rows)


def _page(name: str, **values: Any) -> str:
    return _pages().get_template(name).render(values)


@lru_cache(maxsize=1)
def _pages() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
