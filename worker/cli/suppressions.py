"""postroom suppress ...: who is not to be written to."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from worker.cli import output
from worker.cli.doors import By, Json, Why, login, migrated

app = typer.Typer(
    help="Addresses that are not written to: add, remove, list, import.", no_args_is_help=True
)

Addresses = Annotated[list[str], typer.Argument(metavar="ADDRESS...", help="Mail addresses.")]
Reason = Annotated[str | None, typer.Option(help="Why this person is not written to.")]
#: Columns that hold the address, in order of preference.
_NAMES = ("address", "to", "email")


@app.command()
def add(
    addresses: Addresses, reason: Reason = None, by: By = None, why: Why = None, json: Json = False
) -> None:
    """From now on these are not written to, also by what is queued."""
    from worker.client import Client

    with migrated() as rt:
        done = Client(lambda: rt).suppress(addresses, reason=reason, by=by or login(), why=why)
    _say(done, f"{done['added']} added, {done['known']} were there already", json=json)


@app.command()
def remove(addresses: Addresses, by: By = None, why: Why = None, json: Json = False) -> None:
    """These may be written to again."""
    from worker.client import Client

    with migrated() as rt:
        done = Client(lambda: rt).unsuppress(addresses, by=by or login(), why=why)
    _say(done, f"{done['removed']} removed, {done['unknown']} were not there", json=json)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 1_000_000,
    json: Json = False,
) -> None:
    """All of them, in the order of addresses; --json as an array."""
    from itertools import islice

    from worker.client import Client

    with migrated() as rt:
        rows = islice(Client(lambda: rt).suppressions(), limit)
        if json:
            output.write_array(rows)
            return
        for one in rows:
            reason = f"  {one['reason']}" if one["reason"] else ""
            output.say(f"{one['address']}  {output.time_text(one['at'])}  {one['by']}{reason}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="One address a line, or a CSV.")],
    reason: Reason = None,
    by: By = None,
    why: Why = None,
    json: Json = False,
) -> None:
    """Adds the addresses of a file: one a line, or a CSV with a column address, to or email
    (and, if it likes, reason). Nothing is added where one is wrong.
    """
    from worker.client import Client

    with migrated() as rt:
        done = Client(lambda: rt).suppress(_rows(file), reason=reason, by=by or login(), why=why)
    _say(done, f"{done['added']} added, {done['known']} were there already", json=json)


def _say(document: dict[str, int], line: str, *, json: bool) -> None:
    if json:
        output.print_json(document)
    else:
        output.say(line)


def _rows(path: Path) -> Iterator[tuple[str, str | None]]:
    """(address, reason) of each line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            at, why = 0, -1
            for number, fields in enumerate(row for row in reader if any(f.strip() for f in row)):
                names = [f.strip().lower() for f in fields]
                if number == 0 and (known := [n for n in _NAMES if n in names]):
                    at, why = (
                        names.index(known[0]),
                        names.index("reason") if "reason" in names else -1,
                    )
                    continue
                yield _cell(fields, at) or "", _cell(fields, why)
    except (csv.Error, UnicodeError) as error:
        raise output.Failed(f"{path}: is no list in UTF-8 ({error.__class__.__name__})") from None
    except OSError as error:
        raise output.Failed(f"{path}: cannot be read: {error.strerror}") from None


def _cell(fields: list[str], at: int) -> str | None:
    return fields[at].strip() or None if 0 <= at < len(fields) else None
