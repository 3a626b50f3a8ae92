"""The journal that a command works on, and how its runs are printed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from .._stored import StoredRun
from .._text import name_hint
from ..errors import JournalError
from ..journal.file import connect, require
from ._output import refusal

JournalPath = Annotated[
    Path, typer.Option("--journal", envvar="AFTERTASK_JOURNAL", help="The journal's file, as in Settings.journal.")
]


@contextmanager
def journal(path: Path, *, readonly: bool) -> Iterator[sqlite3.Connection]:
    """A journal that workers may be using; an error of the file ends the command with code 2."""
    try:
        require(path)
        with closing(connect(path, readonly=readonly)) as db:
            yield db
    except JournalError as error:
        raise refusal(str(error)) from None
    except sqlite3.Error as error:
        raise refusal(f"the journal {path} cannot be used: {error}") from None


def check_task(db: sqlite3.Connection, task: str | None) -> None:
    """Refuse a task that no run has, once a command has found nothing: it would look as if all were well."""
    known = [str(name) for (name,) in db.execute("SELECT DISTINCT task FROM runs")]
    if task is not None and task not in known:
        hint = name_hint(task, known) if known else "it has no runs yet"
        raise refusal(f"the journal has no run of a task {task!r}; {hint}")


def as_json(run: StoredRun) -> str:
    """A run as one line of JSON."""
    return json.dumps({**asdict(run), "at": run.at.isoformat()}, default=str)


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> Iterable[str]:
    """Columns as wide as their widest cell; the last one is not padded."""
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    for row in (header, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def moment(timestamp: float | None) -> str:
    """A moment in UTC, to the second."""
    return "-" if timestamp is None else datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def seconds(value: float | None) -> str:
    """A duration with three digits."""
    return "-" if value is None else f"{value:.3g} s"


def what_happened(run: StoredRun) -> str:
    """Why it ended as it did, or how far it has come."""
    if run.error_type is not None:
        return f"{run.error_type}: {(run.error_message or '').partition(chr(10))[0][:60]}"
    if run.dead or run.reason:
        return str(run.dead or run.reason)
    return "" if run.progress is None else run.progress.text
