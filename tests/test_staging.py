"""Staging: a test environment writes to nobody it should not."""

from __future__ import annotations

import pytest

from worker.config import Settings
from worker.model import InvalidSettings
from worker.staging import MOST_SUBJECT, Staging, refusal, staged

CONTENT = {
    "to": [{"address": "ann@example.com", "name": "Ann"}], "cc": [{"address": "b@example.org"}],
    "bcc": [{"address": "c@example.com"}, {"address": "d@example.com"}],
    "reply_to": [{"address": "desk@example.com"}], "importance": "high",
}  # fmt: skip


def test_everything_goes_to_one_address_and_the_subject_says_to_whom_it_was() -> None:
    """No cc, no bcc; the rest of the message stays as it was."""
    content, subject = staged(Staging("test@contoso.com"), CONTENT, "Invoice 5")

    assert content == {"to": [{"address": "test@contoso.com"}], "importance": "high",
                       "reply_to": [{"address": "desk@example.com"}]}  # fmt: skip
    assert subject == "[to ann@example.com, b@example.org, c@example.com +1] Invoice 5"
    assert len(staged(Staging("t@contoso.com"), CONTENT, "x" * 250)[1]) == MOST_SUBJECT


def test_without_staging_nothing_changes() -> None:
    """The usual case costs nothing."""
    assert staged(Staging(), CONTENT, "x") == (CONTENT, "x")
    assert refusal(Staging(), CONTENT) is None
    assert Staging().document() is None


def test_a_stranger_among_the_recipients_refuses_the_message() -> None:
    """In whatever field; the reason names the domain and not the person."""
    assert (
        refusal(Staging(allowed_domains=frozenset({"example.com", "example.org"})), CONTENT) is None
    )
    why = refusal(Staging(allowed_domains=frozenset({"example.com"})), CONTENT)

    assert why == "the domain example.org is not among ALLOWED_DOMAINS"


def test_the_settings_are_checked_and_read_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip here would send to real people: it is refused at start."""
    monkeypatch.setenv("POSTROOM_ALLOWED_DOMAINS", "Example.com, @example.org,")
    monkeypatch.setenv("POSTROOM_REDIRECT_TO", "test@contoso.com")
    staging = Settings.from_env().staging

    assert staging == Staging("test@contoso.com", frozenset({"example.com", "example.org"}))
    assert str(staging) == ("REDIRECT_TO: all mail goes to test@contoso.com; ALLOWED_DOMAINS: "
                            "only mail to example.com, example.org is sent")  # fmt: skip
    monkeypatch.setenv("POSTROOM_REDIRECT_TO", "nobody")
    monkeypatch.setenv("POSTROOM_ALLOWED_DOMAINS", "example")
    with pytest.raises(
        InvalidSettings, match=r"REDIRECT_TO.*no address.*ALLOWED_DOMAINS.*no domain"
    ):
        Settings.from_env()
