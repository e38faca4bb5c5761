"""Every code has its plain words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from worker.meanings import MEANINGS, meaning
from worker.policy import BY_CODE, BY_STATUS, LEASE_NEARLY_OVER

WORKER = Path(__file__).parent.parent / "worker"


def test_every_code_that_has_an_outcome_has_a_meaning() -> None:
    """A manager reads the report, not Microsoft's table."""
    assert [code for code in [*BY_CODE, LEASE_NEARLY_OVER] if code not in MEANINGS] == []


def test_every_code_that_the_store_sets_has_a_meaning() -> None:
    """Those that no answer of Graph brings: leases, deadlines, suppressions."""
    written = " ".join(path.read_text() for path in (WORKER / "store").rglob("*.py"))

    ours = {"LeaseExpired", "Quarantined", "Expired", "Suppressed"}

    assert ours <= MEANINGS.keys()
    assert [code for code in ours - {"Suppressed"} if f'"{code}"' not in written] == []


@pytest.mark.parametrize("status", [*(s for s in BY_STATUS if s >= 300), 400, 403, 404, 500, 503])
def test_an_unknown_code_is_explained_by_its_status(status: int) -> None:
    """Codes may appear at any time: something is said of each."""
    assert meaning("NeverHeardOf", status).text


def test_meanings_are_sentences_of_one_line() -> None:
    """They stand in tables and pages."""
    for code, one in MEANINGS.items():
        assert re.fullmatch(r"[A-Z][^\n]{5,110}\.", one.text), code
        assert re.fullmatch(r"([A-Z][^\n]{5,110})?", one.advice), code
