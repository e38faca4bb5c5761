"""The doctor: is everything there that a first mail needs, and if not, the one thing to do.

The checks run in the order of the set-up: a later one is skipped where it stands on an earlier
one that failed. Nothing is sent without `send`. What Microsoft says is asked afresh each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from worker.config import Settings
from worker.doctor.values import FLOWER, Check, Status, Visit, failed, passed, warned
from worker.model import InvalidSettings
from worker.runtime import Runtime

__all__ = ["Check", "Status", "Visit", "examine"]


def _order() -> Sequence[Callable[[Visit], Iterator[Check]]]:
    # Imported here: a worker, which asks one of these at its start, needs none of the others.
    from worker.doctor import letter, microsoft, servers, service

    return (
        servers.redis,
        servers.database,
        microsoft.entra,
        servers.clocks,
        microsoft.certificate,
        microsoft.credential,
        microsoft.roles,
        microsoft.mailbox,
        microsoft.outside,
        letter.letter,
        service.mailboxes,
        service.limits,
        service.external,
        service.workers,
        service.beat,
        service.flower,
    )


def examine(
    *, mailbox: str | None = None, outside: str | None = None, send: bool = False,
    flower: str | None = None,
) -> Iterator[Check]:  # fmt: skip
    """Every check, each as soon as it is made.

    `mailbox` must be inside the application's scope, `outside` must not be; `send` sends one real
    mail from `mailbox` to itself. `flower`: where Flower is looked for.
    """
    try:
        settings = Settings.from_env()
    except InvalidSettings as error:
        yield failed("settings", str(error), "correct it in the environment or in .env")
        return
    yield from _settings(settings)
    rt = Runtime(settings)
    try:
        visit = Visit(rt, mailbox, outside, send, flower or FLOWER)
        for examination in _order():
            yield from examination(visit)
    finally:
        rt.close()


def _settings(settings: Settings) -> Iterator[Check]:
    name = "settings"
    absent = list(_absent(settings))
    for problem in absent:
        yield failed(name, problem, "set it in the environment or in .env; see docs/settings.md")
    for unknown, likely in Settings.misspelt():
        meant = f"; is {likely} meant?" if likely else ""
        yield warned(name, f"{unknown} is no setting{meant}", "correct or remove it")
    if not absent:
        yield passed(name, "all that is needed is set")


def _absent(settings: Settings) -> Iterator[str]:
    for needed in (settings.require_database_url, settings.identity, settings.credential):
        try:
            needed()
        except InvalidSettings as error:
            yield str(error)
