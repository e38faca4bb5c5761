"""The page about one batch that anyone may be shown: what it says, from what SQL knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from worker.meanings import meaning

#: So many bars at most; each then stands for several minutes.
BARS = 120
WIDTH, HEIGHT = 720, 200
_BOTTOM, _TOP = 1, 4

_GROUPS = {
    "sent": ("sent",), "failed": ("failed",), "unknown": ("unknown",),
    "other": ("expired", "suppressed", "cancelled"), "waiting": ("queued", "sending"),
}  # fmt: skip


def totals(counts: Mapping[str, int]) -> dict[str, int]:
    """sent, failed, unknown, other (expired, suppressed, cancelled) and waiting."""
    return {name: sum(counts.get(s, 0) for s in states) for name, states in _GROUPS.items()}


def bars(minutes: Sequence[tuple[datetime, int]]) -> dict[str, Any]:
    """The chart of sends a minute: places of the bars, and what stands at the axes."""
    if not minutes:
        return {"bars": [], "top": 0, "first": None, "last": None, "span": 1}
    first, last = minutes[0][0], minutes[-1][0]
    count = int((last - first) / timedelta(minutes=1)) + 1
    span = -(-count // BARS)
    heights = [0.0] * -(-count // span)
    for minute, sent in minutes:
        heights[int((minute - first) / timedelta(minutes=1)) // span] += sent / span
    top, room = max(heights), HEIGHT - _BOTTOM - _TOP
    step = WIDTH / len(heights)
    drawn = [
        {"x": round(n * step, 1), "y": round(HEIGHT - _BOTTOM - room * h / top, 1),
         "width": round(max(step - 1, 0.5), 1), "height": round(room * h / top, 1),
         "sent": round(h)}
        for n, h in enumerate(heights)
    ]  # fmt: skip
    return {"bars": drawn, "top": round(top), "first": first, "last": last, "span": span}


def shares(found: Mapping[str, int]) -> list[dict[str, Any]]:
    """One bar of all messages, parted by what became of them."""
    whole, at, parts = sum(found.values()) or 1, 0.0, []
    for name, number in found.items():
        if number:
            width = WIDTH * number / whole
            parts.append({"name": name, "x": round(at, 1), "width": round(width, 1)})
            at += width
    return parts


def limited_by(found: Mapping[str, Any], slots: int) -> list[str]:
    """What held the speed, each a sentence; from the answers that were recorded."""
    told = []
    throttled = found["outcomes"].get("throttled", 0)
    answers = sum(found["outcomes"].values())
    if throttled:
        told.append(f"Microsoft asked to slow down {throttled:,} times in {answers:,} requests, "
                    f"for {found['rest']:,.0f} seconds in all.")  # fmt: skip
    if found["seconds"] and found["mailboxes"]:
        most = 60 * slots * found["mailboxes"] / found["seconds"]
        one = found["mailboxes"] == 1
        told.append(f"{found['mailboxes']} mailbox{'' if one else 'es'} with {slots} requests at a "
                    f"time each, answered in {found['seconds']:.2f} seconds on average, can send "
                    f"at most {most:,.0f} messages a minute.")  # fmt: skip
    for outcome, text in _TROUBLE.items():
        if number := found["outcomes"].get(outcome, 0):
            told.append(f"{number:,} {text}")
    return told


_TROUBLE = {
    "blocked": "requests were refused because of the mailbox or the credential; it rested.",
    "notsent": "requests found no connection and were tried again.",
    "unknown": "requests ended without a clear answer; the mailbox rested after each.",
}


def reasons(codes: Sequence[tuple[str, str | None, int]]) -> list[dict[str, Any]]:
    """Why messages were not sent: state, code, how many, in plain words, and what to do."""
    return [
        {"state": state, "code": code or "", "count": number, "text": meaning(code).text,
         "advice": meaning(code).advice}
        for state, code, number in codes
        if code or state != "cancelled"
    ]  # fmt: skip
