"""`aftertask runs`: what the journal knows of runs."""

from __future__ import annotations

import re
import time
from typing import Annotated

import typer

from .. import _clock
from .._stored import StoredRun
from ..events import OUTCOMES
from ..journal.history import find
from ..signals.families import STATES
from ._journal import JournalPath, as_json, check_task, journal, moment, seconds, table, what_happened
from ._output import refusal

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

#: Seconds between two looks of `--follow`.
_LOOK_EVERY = 0.5

_HEADER = ("SCHEDULED", "TASK", "STATE", "ATTEMPTS", "DURATION", "ROUTE", "RUN", "")


def runs(
    path: JournalPath,
    task: Annotated[str | None, typer.Option(help="Only runs of this task.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Only runs in this state: scheduled, queued, running, backoff, or an outcome.")
    ] = None,
    since: Annotated[str | None, typer.Option(help="Only runs of this period: 90s, 15m, 2h, 7d.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of runs; the newest are listed.")] = 50,
    as_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep listing new runs and changes.")] = False,
) -> None:
    """List runs, the newest last, from a journal that workers may be using."""
    if state not in (None, *STATES, *OUTCOMES):
        raise refusal(f"--state takes one of {', '.join((*STATES, *OUTCOMES))}, got {state!r}")
    after = None if since is None else _clock.timestamp() - _seconds(since)
    with journal(path, readonly=True) as db:
        known, is_first = dict[str, str](), True
        while True:
            found = [StoredRun.of(row) for row in find(db, task=task, state=state, after=after, most=limit)][::-1]
            if not found and not follow:
                check_task(db, task)
            changed = [run for run in found if known.get(run.id) != _version(run)]
            known = {run.id: _version(run) for run in found}
            _print(changed, as_lines=as_lines, with_header=is_first)
            is_first = False
            if not follow:
                return
            time.sleep(_LOOK_EVERY)


def _print(found: list[StoredRun], *, as_lines: bool, with_header: bool) -> None:
    if as_lines:
        lines = [as_json(run) for run in found]
    else:
        lines = list(table([_cells(run) for run in found], _HEADER))[0 if with_header else 1 :]
    for line in lines:
        typer.echo(line)


def _version(run: StoredRun) -> str:
    return f"{run.state} {run.attempt} {run.progress}"


def _cells(run: StoredRun) -> tuple[str, ...]:
    route = f"{run.http_method or ''} {run.http_route or '-'}".strip()
    cells = (moment(run.timestamp), run.task, run.state, str(run.attempt), seconds(run.duration_s), route, run.id)
    return (*cells, what_happened(run))


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise refusal(f"--since takes a number and a unit, such as 90s, 15m, 2h or 7d, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]
