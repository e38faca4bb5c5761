"""The options of `postroom send`, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from worker.cli.source import Format

Rows = Annotated[
    Path | None,
    typer.Argument(metavar="[CSV]", help="Column `to`; others: variables. -: standard input."),
]
To = Annotated[
    list[str] | None, typer.Option(help="One message, to this address (or these), and no CSV.")
]
Subject = Annotated[str | None, typer.Option(help="The subject, a template too.")]
Sender = Annotated[str | None, typer.Option(help="The mailbox to send from.")]
Pool = Annotated[str | None, typer.Option(help="Or the pool of mailboxes.")]
Html = Annotated[Path | None, typer.Option(help="Template of the HTML body.")]
Text = Annotated[Path | None, typer.Option(help="Template of the text body. -: standard input.")]
Attach = Annotated[
    list[Path] | None, typer.Option(help="A file for every mail; again for more files.")
]
RowsFormat = Annotated[
    Format | None, typer.Option(help="What the rows are [by the file's name, else csv].")
]
Name = Annotated[str | None, typer.Option(help="The batch's name.")]
Key = Annotated[str | None, typer.Option(help="A repeat with the same key adds nothing.")]
PriorityName = Annotated[str, typer.Option(help="high, normal or bulk.")]
SendAt = Annotated[
    str | None, typer.Option(help="Not before, with its zone: 2026-10-25T09:00+02:00.")
]
ExpiresAt = Annotated[str | None, typer.Option(help="Not after, likewise.")]
Encoding = Annotated[str, typer.Option(help="The encoding of the CSV.")]
MaxFailures = Annotated[
    str | None, typer.Option(help="Pause after so many rejections in a row; off: never.")
]
OnFinished = Annotated[
    str | None, typer.Option(help="A Celery task of your own, called when it has finished.")
]
IgnoreSuppressions = Annotated[
    bool, typer.Option("--ignore-suppressions", help="For legal notices; an event says so.")
]
SkipInvalid = Annotated[
    bool, typer.Option("--skip-invalid", help="Leave bad rows out, send the others.")
]
Rejected = Annotated[
    Path | None, typer.Option(help="Write the bad rows here, with what is wrong, to mend.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check all, show the first rows, send nothing.")
]
Preview = Annotated[
    Path | None, typer.Option(help="With --dry-run: a page that shows the first rows.")
]
