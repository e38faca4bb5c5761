"""postroom batch watch on a terminal: bars by state, rate, time left, what binds, who rests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from worker.cli import blocked, output
from worker.model import BatchState, State

if TYPE_CHECKING:
    from rich.console import RenderableType

ENDED = (BatchState.FINISHED, BatchState.CANCELLED)
_COLOURS = {State.SENT: "green", State.FAILED: "red", State.UNKNOWN: "yellow"}


def live(look: Callable[[], dict[str, Any]], pause: Callable[[], None]) -> Any:
    """Shows `look()` again and again until the batch has ended; its last answer."""
    from rich.live import Live

    with Live(console=output.console(), auto_refresh=False) as shown:
        while True:
            found = look()
            shown.update(picture(found), refresh=True)
            if found["state"] in ENDED:
                return found
            pause()


def picture(found: Mapping[str, Any]) -> RenderableType:
    """One look, drawn."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bars = Table.grid(padding=(0, 1))
    for state, number in found["counts"].items():
        if number:
            colour = _COLOURS.get(State(state), "cyan")
            bar = ProgressBar(total=max(1, found["total"]), completed=number, width=40,
                              complete_style=colour, finished_style=colour)  # fmt: skip
            bars.add_row(state, bar, f"{number:,}")
    head = f"{found['name'] or found['batch_id']}: {found['state']}, {found['total']:,} messages"
    rate = f"{found['rate_per_minute']:,} a minute"
    lines = [rate if found["eta"] is None else f"{rate}, {left(found['eta'])} to go"]
    if found["limit"]:
        lines.append(f"bound by: {found['limit']}")
    lines += blocked.lines(found["blocked"])
    return Group(Text(head, style="bold"), bars, *(Text(line) for line in lines))


def left(seconds: int) -> str:
    """A time for people: 1 h 05 min, 3 min 20 s, 40 s."""
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // 60} min {seconds % 60:02} s" if seconds >= 60 else f"{seconds} s"
