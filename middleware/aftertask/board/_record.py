"""`Record`: the signal that keeps the last runs of this process for the board, bounded in every respect."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass

from .. import _clock, events
from .._taskrun import RequestInfo, TaskInfo, TaskRun
from ._entry import Attempt, Entry, Note, Origin, Trail, entry_of, short
from ._tally import Buckets, Tally

#: Tasks beyond this many are counted together; hazards and pools beyond it are not kept.
MOST_NAMES, OTHER = 200, "__other__"

#: The last runs that ended, and those that ended badly or failed, with stacks: successes never push these out.
_RUNS, _FAILURES = 2000, 500
#: The most attempts, the last ones, and notes that are kept of a run.
_ATTEMPTS, _NOTES = 20, 10


@dataclass(slots=True)
class Hazard:
    """A hazard of a task: how often it was found, and when and where last."""

    task: str
    kind: str
    advice: str
    at: float
    run_id: str
    times: int = 1


class Record(events.Signal):
    """Keeps what the board shows. An ended run costs microseconds; a run in flight costs nothing until it is shown."""

    def __init__(self) -> None:
        self.since = _clock.timestamp()
        self.lock = threading.RLock()  # a signal handler may lose runs while this thread holds it
        self.tallies: dict[str, Tally] = {}
        self.hazards: dict[tuple[str, str], Hazard] = {}
        self.pools: dict[tuple[str, bool], events.Pool] = {}
        self.lag, self.last_lag = Buckets(), 0.0
        self.version = 0
        self.last_number = 0
        self._recent: deque[Entry] = deque(maxlen=_RUNS)
        self._failures: deque[Entry] = deque(maxlen=_FAILURES)
        self._trails = defaultdict[TaskRun, Trail](lambda: Trail([], []))  # each run ends, and is removed then
        self._origins: weakref.WeakKeyDictionary[RequestInfo, Origin] = weakref.WeakKeyDictionary()

    def _end(self, event: events.Ended) -> None:
        run = event.run
        with self.lock:
            entry = self._entry(run)
            self._trails.pop(run, None)
            self.last_number += 1
            entry.number, entry.ended, entry.bad = self.last_number, event.timestamp, event.bad
            entry.reason = getattr(event, "reason", None)
            entry.raised = short(event.error_type or "") if isinstance(event, events.Dropped) else ""
            if isinstance(event, events.Skipped) and event.caused_by is not None:
                entry.caused_by = event.caused_by.id, short(event.caused_by.task)
            last = entry.last
            if last is not None and last.delay_s is None:  # else it was cancelled in its back-off
                last.duration_s = getattr(event, "duration_s", None)
                if isinstance(event, (events.Failed, events.TimedOut)):
                    _add_failure(last, event.failure)
            self._recent.append(entry)
            if entry.bad or entry.state in ("failed", "timed_out"):
                if len(self._failures) == self._failures.maxlen:
                    self._failures[0].drop_stacks()
                self._failures.append(entry)
            else:
                entry.drop_stacks()
            self._tally(run.info).count(event)
            self.version += 1

    succeeded = failed = timed_out = cancelled = skipped = _end
    dropped = rejected = expired = lost = offloaded = _end

    def _tally(self, info: TaskInfo) -> Tally:
        name = short(info.task)
        if name not in self.tallies and len(self.tallies) >= MOST_NAMES:
            name, info = OTHER, TaskInfo(OTHER, OTHER)
        if name not in self.tallies:
            self.tallies[name] = Tally(info)
        return self.tallies[name]

    def retrying(self, event: events.Retrying) -> None:
        """Keep the attempt."""
        attempt = Attempt(event.attempt, event.timestamp - event.duration_s, event.duration_s, delay_s=event.delay_s)
        _add_failure(attempt, event.failure)
        with self.lock:
            attempts = self._trails[event.run].attempts
            for earlier in attempts:
                earlier.stack = None
            attempts[:] = [*attempts, attempt][-_ATTEMPTS:]
            self.version += 1

    def _long(self, event: events.Slow | events.Stuck | events.Abandoned) -> None:
        text = f"running for {event.running_s:.3g} s, limit {event.limit_s:.3g} s"
        self._note(event.run, Note(event.timestamp, type(event).__name__.lower(), text, event.stack))

    slow = stuck = abandoned = _long

    def hazard_found(self, event: events.HazardFound) -> None:
        """Count the hazard, and add it to its run."""
        advice = event.advice if event.argument is None else f"argument {event.argument!r}: {event.advice}"
        self._count_hazard(Hazard(short(event.run.task), event.kind, advice, event.timestamp, event.run.id))
        self._note(event.run, Note(event.timestamp, event.kind, advice, event.stack))

    def _count_hazard(self, hazard: Hazard) -> None:
        key = hazard.task, hazard.kind
        with self.lock:
            self.version += 1
            if key in self.hazards:
                hazard.times += self.hazards[key].times
            if key in self.hazards or len(self.hazards) < MOST_NAMES:
                self.hazards[key] = hazard

    def _note(self, run: TaskRun, note: Note) -> None:
        with self.lock:
            self.version += 1
            if run.outcome is None:
                notes = self._trails[run].notes
            else:  # a trap is found in what a run has returned
                notes = next((entry.notes for entry in reversed(self._recent) if entry.id == run.id), [])
                note.stack = None
            if len(notes) < _NOTES:
                notes.append(note)

    def task_known(self, info: TaskInfo) -> None:
        """List a registered task before its first run."""
        if info.registered:
            with self.lock:
                self._tally(info).info = info

    def pool_known(self, pool: events.Pool, *, threads: bool) -> None:
        """Show a concurrency limiter or a thread pool."""
        key = short(pool.name), threads
        if key in self.pools or len(self.pools) < MOST_NAMES:
            self.pools[key] = pool

    def loop_lag(self, seconds: float) -> None:
        """Record how late the event loop responded."""
        self.last_lag = seconds
        self.lag.add(_clock.timestamp(), seconds, max)

    def loop_blocked(self, report: events.LoopBlocked) -> None:
        """Count a block that no run is to blame for; the others are hazards of their task."""
        if report.run is None:
            advice = f"no background task is to blame; the last time for {report.blocked_s:.3g} s at {report.where}"
            self._count_hazard(Hazard("", "blocked_loop", advice, report.timestamp, ""))

    def ended(self) -> list[Entry]:
        """The runs that are kept, the last to end first."""
        with self.lock:
            recent, failures = list(self._recent), list(self._failures)
        oldest = recent[0].number if recent else 0
        return [*reversed(recent), *(entry for entry in reversed(failures) if entry.number < oldest)]

    def in_flight(self, runs: list[TaskRun]) -> list[Entry]:
        """These runs as they are now."""
        with self.lock:
            return [self._entry(run) for run in runs]

    def _entry(self, run: TaskRun) -> Entry:
        request = run.request
        origin = self._origins.get(request)
        if origin is None:
            origin = self._origins[request] = Origin(request.http_method, request.http_route, request.request_id)
        origin.route = request.http_route  # it may be found late
        return entry_of(run, origin, self._trails.get(run))


def _add_failure(attempt: Attempt, failure: events.Failure) -> None:
    attempt.error_type, attempt.message = short(failure.type), failure.message
    attempt.stack, attempt.hint = failure.stack, failure.hint
