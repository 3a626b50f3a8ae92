"""The board's source of runs: those of this process from memory, those of all workers from the journal."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from .. import _clock
from .._core.emit import Emitter
from .._core.stacks import stack_of
from .._stored import Row, StoredRun
from .._taskrun import TaskRun, in_flight
from ..errors import JournalError
from ..journal import history, letters
from ..journal.history import Db
from ..journal.letters import Group
from ..journal.rows import Place, count
from ..journal.store import Journaling
from ..signals import families
from ._entry import Entry, entry_of_row, short
from ._query import DeadQuery, RunQuery
from ._record import Record
from ._tally import WIDTH, Tally, quantile

T = TypeVar("T")

#: The most runs in flight that are looked at, the newest ones: of this process, and of other workers.
_MOST_IN_FLIGHT, _MOST_ELSEWHERE = 5_000, 500
#: The longest lists: of the first page, of the siblings of a run, of changes, and of groups of dead letters.
_RUNNING, _FAILURES, _SIBLINGS, _CHANGES, _GROUPS = 10, 10, 100, 200, 50


class TaskLine(NamedTuple):
    """One task in the last ten minutes; `ended` and `bad` by time, the oldest first; None where there was no run."""

    task: str
    owner: str | None
    in_flight: int
    runs: int
    bad_runs: int
    ended: list[float]
    bad: list[float]
    p50_s: float | None
    p95_s: float | None
    wait_p95_s: float | None
    last_success: float | None
    last_bad: float | None
    failing_since: float | None


class Dead(NamedTuple):
    """Dead letters: groups of similar ones, the number that match, one page of them, and where the next begins."""

    groups: list[tuple[Group, Entry]]
    number: int
    letters: list[Entry]
    place: Place | None


class Source:
    """
    The runs of one app: what this process knows, and what the app's journal says, if it has one.

    Attributes:
        app: Only runs of this app are shown; None until the middleware has been built around it.
        journal: None if the app has none.
        trouble: Why the journal could not be read the last time; None if it could.
    """

    def __init__(self, record: Record) -> None:
        self.app: Emitter | None = None
        self.journal: Journaling | None = None
        self.trouble: str | None = None
        self._record = record
        self._boot = os.urandom(4).hex()

    def cursor(self, version: int = 0) -> str:
        """A text that changes with what this process knows: the ends so far, the states in flight, the graphs' end."""
        states = [(run.id, run.state, run.attempt, run.progress) for run in self._in_flight()]
        shown = repr((states, int(_clock.timestamp() / WIDTH), self._record.version, version))
        digest = zlib.crc32(shown.encode("utf-8", "replace"))
        return f"{self._boot}.{self._record.last_number}.{digest:x}"

    async def page_cursor(self) -> str:
        """The same for pages: it also changes with each write to the journal."""
        return self.cursor(await self._look(history.version) or 0)

    async def runs(self, query: RunQuery) -> tuple[list[Entry], Place | None]:
        """The runs that match a query, those in flight first; and where the next page begins, None at the end."""
        found = [entry for entry in self._all() if query.matches(entry)][: query.limit + 1]
        ids = [entry.id for entry in found]
        stored = await self._look(lambda db: _rows_of_page(db, query, ids))
        place = None
        if stored is not None:
            rows, place = stored
            found = [
                entry
                for entry in self._joined(found, rows)
                if query.matches(entry) and (place is None or entry.place >= place)
            ]
        page = found[: query.limit]
        return page, place if page == found else page[-1].place

    def _joined(self, mine: list[Entry], rows: Sequence[Row]) -> list[Entry]:
        """This process's runs from memory, and the others from the journal, the newest first."""
        joined = {entry.id: entry for entry in mine}
        for row in rows:
            # An own run that has not ended there, and is not known here, has ended since.
            if row["id"] in joined or row["settled_at"] is not None or not self._owns(row):
                joined[row["id"]] = self._entry(row, joined.get(row["id"]))
        return sorted(joined.values(), key=lambda each: (each.ended is None, each.ended or each.scheduled, each.id))[
            ::-1
        ]

    async def run(self, run_id: str) -> Entry | None:
        """One run; None if it is unknown, or no longer kept."""
        mine = next((entry for entry in self._all() if entry.id == run_id), None)
        found = await self._look(lambda db: history.named(db, [run_id]))
        return self._entry(found[0], mine) if found else mine

    async def arguments(self, run_id: str) -> str | None:
        """The arguments of a durable run, as JSON; None if they are not stored."""
        return await self._look(lambda db: history.arguments(db, run_id))

    async def siblings(self, entry: Entry) -> list[Entry]:
        """The other runs of the same request, in the order of scheduling."""
        found = {each.id: each for each in self._all() if each.origin is entry.origin}
        if (first := entry.first) is not None:
            for row in await self._look(lambda db: history.siblings(db, first, _SIBLINGS + 1)) or ():
                found[row["id"]] = self._entry(row, found.get(row["id"]))
        found.pop(entry.id, None)
        return sorted(found.values(), key=lambda each: each.scheduled)[:_SIBLINGS]

    async def dead(self, query: DeadQuery) -> Dead:
        """Dead letters of all workers."""

        def look(db: Db) -> tuple[list[Group], int, Sequence[Row]]:
            found = letters.letters(db, query.match, query.place, query.limit + 1)
            return letters.groups(db, query.match, _GROUPS), letters.count(db, query.match), found

        groups, number, found = await self._look(look) or ([], 0, ())
        page = [self._entry(row) for row in found]
        place = page[query.limit - 1].place if len(page) > query.limit else None
        return Dead([(group, self._entry(group.newest)) for group in groups], number, page[: query.limit], place)

    async def dead_ids(self, match: letters.Match) -> list[str]:
        """The ids of all dead letters that match, the oldest first."""
        return await self._look(lambda db: letters.ids(db, match)) or []

    async def journal_state(self) -> dict[str, object] | None:
        """The contents of the journal, and the writes of this process that failed; None if there is no journal."""
        if self.journal is None:
            return None
        waiting, dead = await self._look(count) or ({}, 0)
        name, meter = self.journal.store.path.name, self.journal.meter
        return {"name": name, "dead": dead, "waiting": waiting, "errors": meter.errors, "dropped": meter.dropped}

    async def _look(self, look: Callable[[Db], T]) -> T | None:
        """The result of reading the journal; None if there is none, or it cannot be read."""
        if self.journal is None:
            return None
        try:
            found = await self.journal.store.browse(look)
        except JournalError as error:
            self.trouble = str(error)
            return None
        self.trouble = None
        return found

    def _owns(self, row: Row) -> bool:
        return self.journal is not None and row["owner"] == self.journal.store.number

    def _entry(self, row: Row, mine: Entry | None = None) -> Entry:
        """A run of the journal, or this process's own record of it unless another process has taken it over."""
        if mine is not None and self._owns(row):
            return replace(mine, stored=StoredRun.of(row), first=row["first"])
        tally = self._record.tallies.get(short(row["task"]))
        return entry_of_row(row, None if tally is None else tally.info)

    def changes(self, after: str | None) -> tuple[list[Entry], bool]:
        """The runs in flight, and those that ended since a cursor was given; and whether some are left out."""
        boot, last, _ = (after or "..").split(".")
        number = int(last) if boot == self._boot else 0
        found = [entry for entry in self._all() if entry.ended is None or entry.number > number]
        is_gap = self._record.last_number - number > sum(entry.number > 0 for entry in found[:_CHANGES])
        return found[:_CHANGES], is_gap

    def stack(self, run_id: str) -> str | None:
        """Where a running run is now; None if that cannot be seen."""
        run = next((run for run in self._in_flight() if run.id == run_id), None)
        return stack_of(run, self.app.redact) if self.app and run and run.state == "running" else None

    def tasks(self) -> list[TaskLine]:
        """The tasks, failing ones first."""
        at, flying = _clock.timestamp(), Counter(run.task for run in self._in_flight())
        with self._record.lock:
            lines = [_line(name, each, flying[each.info.task], at) for name, each in self._record.tallies.items()]
        return sorted(lines, key=lambda line: (line.failing_since is None, -line.bad_runs, -line.runs, line.task))

    def overview(self) -> dict[str, object]:
        """The part of the first page about this process; each pool with whether it is a thread pool."""
        record, flying = self._record, self._in_flight()
        running = sorted((run for run in flying if run.state == "running"), key=lambda run: run.started_s or 0.0)
        queued = [run for run in flying if run.state == "queued"]
        return {
            "tasks": self.tasks(),
            "since": record.since,
            "states": Counter(run.state for run in flying),
            "queued": record.in_flight(queued[-1:]),
            "running": record.in_flight(running[:_RUNNING]),
            "failures": _grouped(record.ended())[:_FAILURES],
            "lag": record.lag.until(_clock.timestamp()),
            "last_lag_s": record.last_lag,
            "pools": [(pool, threads) for (_, threads), pool in list(record.pools.items())],
            "hazards": sorted(record.hazards.values(), key=lambda hazard: -hazard.at),
        }

    def _in_flight(self) -> list[TaskRun]:
        """The newest first."""
        runs = list(in_flight)[-_MOST_IN_FLIGHT:]
        return [run for run in reversed(runs) if run.request.app is self.app]

    def _all(self) -> list[Entry]:
        return self._record.in_flight(self._in_flight()) + self._record.ended()


def _rows_of_page(db: Db, query: RunQuery, ids: Sequence[str]) -> tuple[Sequence[Row], Place | None]:
    """Runs in flight, those with these ids, and those that ended; and where the next page of these begins."""
    rows, place = list[Row](history.named(db, ids)), None
    if query.place is None and query.state in ("", "in_flight", *families.STATES):
        rows += history.unended(db, _MOST_ELSEWHERE)
    if query.state not in ("in_flight", *families.STATES):
        ended, place = history.ended(
            db, task=query.task, state=query.state, text=query.q, before=query.place, most=query.limit
        )
        rows += ended
    return rows, place


def _grouped(ended: list[Entry]) -> list[tuple[Entry, int]]:
    """The last of each kind of bad run, and their number; skipped runs are left out, dropped ones come last."""
    groups: dict[tuple[object, ...], tuple[Entry, int]] = {}
    for entry in ended:
        if entry.bad and entry.state != "skipped":
            key = entry.task, entry.state, entry.reason, entry.raised, entry.last and entry.last.error_type
            last, times = groups.get(key, (entry, 0))
            groups[key] = last, times + 1
    return sorted(groups.values(), key=lambda group: group[0].state == "dropped")


def _line(name: str, tally: Tally, flying: int, at: float) -> TaskLine:
    ended, bad = tally.ended.until(at), tally.bad.until(at)
    runs = flying, int(sum(ended)), int(sum(bad)), ended, bad
    times = quantile(0.5, tally.durations), quantile(0.95, tally.durations), quantile(0.95, tally.waits)
    moments = tally.last_success, tally.last_bad, tally.failing_since(at)
    return TaskLine(name, tally.info.owner and short(tally.info.owner), *runs, *times, *moments)
