"""All that the board reads of runs: for now those of this process, from its record and from what is in flight."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from typing import NamedTuple

from .. import _clock
from .._core.stacks import stack_of
from .._taskrun import TaskRun, in_flight
from .._text import Redact
from ._entry import Entry, short
from ._query import RunQuery
from ._record import Record
from ._tally import WIDTH, Tally, quantile

#: Of more runs in flight than this, only the newest are looked at.
_MOST_IN_FLIGHT = 5_000
#: The longest lists: of the first page, of the siblings of a run, and of changes.
_RUNNING, _FAILURES, _SIBLINGS, _CHANGES = 10, 10, 100, 200


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


class Source:
    """
    The runs of this process, of the one `app` if that is set; `redact` is applied to the stacks of what runs.

    Its methods are awaited, so that a source may look elsewhere than in memory.
    """

    def __init__(self, record: Record) -> None:
        self.app: object = None
        self.redact: Redact = str
        self._record = record
        self._boot = os.urandom(4).hex()

    def cursor(self) -> str:
        """A text that changes with what is shown: the ends so far, the states in flight, what graphs end with."""
        states = [(run.id, run.state, run.attempt, run.progress) for run in self._in_flight()]
        shown = repr((states, int(_clock.timestamp() / WIDTH), self._record.version))
        digest = zlib.crc32(shown.encode("utf-8", "replace"))
        return f"{self._boot}.{self._record.last_number}.{digest:x}"

    async def runs(self, query: RunQuery) -> tuple[list[Entry], int | None]:
        """The runs that a query asks for, the last to end first; and `before` of the next page, None after the last."""
        found = [entry for entry in self._all() if query.matches(entry)]
        page = found[: query.limit]
        return page, None if page == found else page[-1].number or self._record.last_number + 1

    async def run(self, run_id: str) -> Entry | None:
        """One run; None if it is not known, or no longer kept."""
        return next((entry for entry in self._all() if entry.id == run_id), None)

    async def siblings(self, entry: Entry) -> list[Entry]:
        """The other runs of the same request, in the order of scheduling."""
        found = [each for each in self._all() if each.origin is entry.origin and each.id != entry.id]
        return sorted(found, key=lambda each: each.scheduled)[:_SIBLINGS]

    async def changes(self, after: str | None) -> tuple[list[Entry], bool]:
        """The runs in flight, and those that ended since a cursor was given; and whether some are left out."""
        boot, _, rest = (after or "").partition(".")
        number = int(rest.partition(".")[0]) if boot == self._boot else 0
        found = [entry for entry in self._all() if entry.ended is None or entry.number > number]
        is_gap = self._record.last_number - number > sum(entry.number > 0 for entry in found[:_CHANGES])
        return found[:_CHANGES], is_gap

    async def stack(self, run_id: str) -> str | None:
        """Where a running run is now; None if that cannot be seen."""
        run = next((run for run in self._in_flight() if run.id == run_id), None)
        return stack_of(run, self.redact) if run is not None and run.state == "running" else None

    async def tasks(self) -> list[TaskLine]:
        """The tasks, those that fail first."""
        at, flying = _clock.timestamp(), Counter(run.task for run in self._in_flight())
        with self._record.lock:
            lines = [_line(name, each, flying[each.info.task], at) for name, each in self._record.tallies.items()]
        return sorted(lines, key=lambda line: (line.failing_since is None, -line.bad_runs, -line.runs, line.task))

    async def overview(self) -> dict[str, object]:
        """What else the first page shows: failures by kind, and each pool with whether it is one of threads."""
        record, flying = self._record, self._in_flight()
        running = sorted((run for run in flying if run.state == "running"), key=lambda run: run.started_s or 0.0)
        queued = [run for run in flying if run.state == "queued"]
        return {
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
        return [run for run in reversed(runs) if self.app is None or run.request.app is self.app]

    def _all(self) -> list[Entry]:
        return self._record.in_flight(self._in_flight()) + self._record.ended()


def _grouped(ended: list[Entry]) -> list[tuple[Entry, int]]:
    """The last of each kind of bad run, and their number; what was skipped is left out, what was dropped comes last."""
    groups: dict[tuple[object, ...], tuple[Entry, int]] = {}
    for entry in ended:
        if entry.bad and entry.state != "skipped":
            key = entry.task, entry.state, entry.reason, entry.raised, entry.last and entry.last.error_type
            last, times = groups.get(key, (entry, 0))
            groups[key] = last, times + 1
    return sorted(groups.values(), key=lambda group: group[0].state == "dropped")


def _line(name: str, tally: Tally, flying: int, at: float) -> TaskLine:
    ended, bad = tally.ended.until(at), tally.bad.until(at)
    return TaskLine(
        name,
        tally.info.owner and short(tally.info.owner),
        flying,
        int(sum(ended)),
        int(sum(bad)),
        ended,
        bad,
        quantile(0.5, tally.durations),
        quantile(0.95, tally.durations),
        quantile(0.95, tally.waits),
        tally.last_success,
        tally.last_bad,
        tally.failing_since(at),
    )
