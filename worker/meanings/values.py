"""What a code means, in the form that reports, status and doctor show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Meaning:
    """One sentence for a reader who knows mail and not Graph, and one for who can mend it."""

    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.advice}".rstrip()
