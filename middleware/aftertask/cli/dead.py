"""`aftertask dead`: the dead letters of a journal."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import astuple
from typing import Annotated

import typer

from .._stored import StoredRun
from ..journal import letters, rows
from ..journal.letters import NO_ERROR, Match
from ..journal.settle import DEAD
from ._journal import JournalPath, as_json, check_task, journal, moment, table, what_happened
from ._output import refusal

app = typer.Typer(help="Dead letters: durable runs that were accepted and did not succeed.", no_args_is_help=True)


def _known(reason: str | None) -> str | None:
    if reason not in (None, *DEAD):
        raise refusal(f"--reason takes one of {', '.join(DEAD)}, got {reason!r}")
    return reason


Task = Annotated[str | None, typer.Option("--task", help="Only letters of this task.")]
Reason = Annotated[
    str | None,
    typer.Option("--reason", help=f"Only letters for this reason: {', '.join(DEAD)}.", callback=_known),
]
Fingerprint = Annotated[
    str | None, typer.Option("--fingerprint", help=f"Only letters with this error; {NO_ERROR}: without one.")
]
Ids = Annotated[list[str] | None, typer.Argument(metavar="RUN…", help="Ids of runs.")]
All = Annotated[bool, typer.Option("--all", help="All letters that match the other options.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


@app.command("list")
def list_(
    path: JournalPath,
    task: Task = None,
    reason: Reason = None,
    each: Annotated[bool, typer.Option("--each", help="One line per letter, not per group.")] = False,
    as_lines: Annotated[bool, typer.Option("--json", help="Print every letter, as one JSON object per line.")] = False,
) -> None:
    """List the dead letters, grouped by task, reason and error."""
    match = Match(task, reason)
    with journal(path, readonly=True) as db:
        groups = letters.groups(db, match)
        if not groups:
            check_task(db, task)
        runs = [StoredRun.of(letter) for letter in letters.letters(db, match)] if as_lines or each else []
    if as_lines or each:
        cells = [(moment(run.settled_timestamp), run.task, str(run.dead), run.id, what_happened(run)) for run in runs]
        lines = map(as_json, runs) if as_lines else table(cells, ("ENDED", "TASK", "REASON", "RUN", ""))
    else:
        lines = table(
            [(str(count), *map(str, astuple(alike)), *_newest(letter)) for alike, count, letter in groups],
            ("COUNT", "TASK", "REASON", "FINGERPRINT", "NEWEST", "FOR EXAMPLE", ""),
        )
    for line in lines:
        typer.echo(line)


def _newest(letter: sqlite3.Row) -> tuple[str, ...]:
    return moment(letter["settled_at"]), letter["id"], what_happened(StoredRun.of(letter))


@app.command()
def show(path: JournalPath, id: Annotated[str, typer.Argument(metavar="RUN", help="Id of the run.")]) -> None:
    """Show one dead letter with its arguments and the stack of its error."""
    with journal(path, readonly=True) as db:
        found = letters.named(db, [id])
    if not found:
        raise refusal(f"no dead letter {id!r}; `aftertask dead list --each` lists them")
    letter = found[0]
    run = StoredRun.of(letter)
    why = DEAD.get(str(run.dead), str(run.dead))
    about = {
        "run": run.id,
        "task": run.task,
        "reason": f"{run.dead}: {why}",
        "scheduled": moment(run.timestamp),
        "ended": moment(run.settled_timestamp),
        "attempts": run.attempt,
        "recoveries": run.recoveries,
        "route": f"{run.http_method or ''} {run.http_route or '-'}".strip(),
        "trace": run.trace_id,
        "replay of": run.replay_of,
        "progress": None if run.progress is None else run.progress.text,
        "arguments": letter["arguments"],
        "error": None if run.error_type is None else f"{run.error_type}: {run.error_message}",
    }
    for name, value in about.items():
        if value is not None:
            typer.echo(f"{name + ':':<12}{value}")
    if run.stack:
        typer.echo(f"\n{run.stack.rstrip()}")


@app.command()
def replay(
    path: JournalPath,
    ids: Ids = None,
    all_: All = False,
    task: Task = None,
    reason: Reason = None,
    fingerprint: Fingerprint = None,
    per_second: Annotated[float, typer.Option(min=0.01, help="Maximum letters per second.")] = letters.PER_SECOND,
    yes: Yes = False,
) -> None:
    """
    Run dead letters again with their stored arguments, in the workers that use the journal.

    Each becomes a new run that is linked to the letter; if it fails, it is a dead letter again.
    """
    with journal(path, readonly=False) as db:
        chosen = _chosen(db, ids, all_, Match(task, reason, fingerprint))
        if chosen and not yes:
            typer.confirm(f"replay {_letters(len(chosen))}?", abort=True)
        done = _counted(letters.each(db, chosen, letters.replay, per_second), len(chosen), "Replaying")
    others = "" if done == len(chosen) else "; the others are gone, or a run with their key has not ended"
    typer.echo(f"{done} of {len(chosen)} dead letters will run again in a worker{others}")


@app.command()
def delete(
    path: JournalPath,
    ids: Ids = None,
    all_: All = False,
    task: Task = None,
    reason: Reason = None,
    fingerprint: Fingerprint = None,
    yes: Yes = False,
) -> None:
    """Delete dead letters for good."""
    with journal(path, readonly=False) as db:
        chosen = _chosen(db, ids, all_, Match(task, reason, fingerprint))
        if chosen and not yes:
            typer.confirm(f"delete {_letters(len(chosen))}?", abort=True)
        done = _counted(letters.each(db, chosen, rows.delete), len(chosen), "Deleting")
    typer.echo(f"{done} of {len(chosen)} dead letters deleted")


def _letters(count: int) -> str:
    return f"{count} dead letter{'s' * (count != 1)}"


def _chosen(db: sqlite3.Connection, ids: list[str] | None, all_: bool, match: Match) -> list[str]:
    """The ids of the letters that the caller means, the oldest first."""
    if bool(ids) == all_:
        raise refusal("name the runs, or --all for all that match --task, --reason and --fingerprint")
    matching = letters.ids(db, match)
    missing = [id for id in ids or () if id not in matching]
    if missing:
        raise refusal(f"no dead letter {', '.join(map(repr, missing))} that matches; see `aftertask dead list --each`")
    if not matching:
        check_task(db, match.task)
    return [id for id in matching if ids is None or id in ids]


def _counted(done: Iterator[bool], total: int, label: str) -> int:
    """How many there still were, with a progress bar."""
    with typer.progressbar(done, length=total, label=label, file=typer.get_text_stream("stderr")) as shown:
        return sum(shown)
