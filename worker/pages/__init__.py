"""Pages for people: self-contained HTML without scripts, safe to send around. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from worker.pages import report
from worker.staging import Staging
from worker.templates import Rendered


def preview_page(first: Sequence[Rendered], to: Sequence[Sequence[str]], rows: int) -> str:
    """The first messages as they would be sent."""
    shown = [{"to": ", ".join(its), "subject": one.subject, "html": one.html, "text": one.text}
             for one, its in zip(first, to, strict=True)]  # fmt: skip
    return _page("preview.html", messages=shown, rows=rows)


def report_page(
    status: Mapping[str, Any], summary: Mapping[str, Any], *, slots: int, now: datetime
) -> str:
    """One batch for anyone: totals, sends a minute, what limited the speed, what failed and why."""
    totals = report.totals(status["counts"])
    staging = Staging(**status["staging"]) if status["staging"] else None
    return _page(
        "report.html", status=status, totals=totals, shares=report.shares(totals),
        chart=report.bars(summary["minutes"]), limits=report.limited_by(summary, slots),
        reasons=report.reasons(summary["codes"]), width=report.WIDTH, height=report.HEIGHT,
        staging=staging, now=now,
    )  # fmt: skip


def _instant(value: datetime | str) -> str:
    instant = datetime.fromisoformat(value) if isinstance(value, str) else value
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _page(name: str, **values: Any) -> str:
    return _pages().get_template(name).render(values)


@lru_cache(maxsize=1)
def _pages() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    made = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters["instant"] = _instant
    return made
