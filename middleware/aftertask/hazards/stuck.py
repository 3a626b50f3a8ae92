"""Runs that take too long, reported while they still run: slow after one limit, stuck after another."""

from __future__ import annotations

import math
import threading
import weakref

from .. import _clock
from .._core.emit import Emitter
from .._core.process import on_fork, start_thread
from .._core.stacks import stack_of
from .._taskrun import TaskRun, in_flight
from ..events import Slow, Stuck, TaskInfo

#: Seconds between two looks: at least, so that short limits make no busy loop, and at most.
SHORTEST, LONGEST = 0.25, 60.0


class StuckWatch:
    """
    One app's running attempts.

    Args:
        emit: Gets `Slow` and `Stuck`; identifies the app.
    """

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._shortest_limit = math.inf
        self._reported: dict[tuple[TaskRun, int], set[type]] = {}
        self._is_open = True

    def add(self, info: TaskInfo) -> None:
        """There is a task with these limits."""
        limits = [info.slow_after if self._emit.wants(Slow) else None]
        limits += [info.stuck_after if self._emit.wants(Stuck) else None]
        shortest = min((limit for limit in limits if limit is not None), default=math.inf)
        if shortest < self._shortest_limit:
            self._shortest_limit = shortest
            _THREAD.watch(self)

    def start(self) -> None:
        """The app serves: look from now on, also after `stop` and after a fork."""
        self._is_open = True
        if self._shortest_limit < math.inf and not _THREAD.watches(self):
            _THREAD.watch(self)

    def stop(self) -> None:
        """The app has stopped."""
        self._is_open = False
        _THREAD.unwatch(self)

    def clock_advanced(self) -> None:
        """A test advanced the clock: what is due is emitted before this returns."""
        if self._is_open and self._shortest_limit < math.inf:
            self.look()

    def after_fork(self) -> None:
        """The thread is the parent's; the first run of the child's starts another."""
        self._lock, self._reported = threading.Lock(), {}

    def look(self) -> float:
        """Emit what has passed its limit; returns the seconds until something else may have."""
        with self._lock:
            now, due = _clock.monotonic(), self._shortest_limit
            reported: dict[tuple[TaskRun, int], set[type]] = {}
            for run in list(in_flight):
                if run.state != "running" or run.started_s is None or run.request.app is not self._emit:
                    continue
                kinds = reported[run, run.attempt] = self._reported.get((run, run.attempt), set())
                due = min(due, self._look_at(run, now - run.started_s, kinds))
            self._reported = reported
            return due

    def _look_at(self, run: TaskRun, running_s: float, reported: set[type]) -> float:
        """Seconds until the run passes its next limit."""
        due = math.inf
        for kind, limit_s in ((Slow, run.info.slow_after), (Stuck, run.info.stuck_after)):
            if limit_s is None or kind in reported:
                continue
            if running_s < limit_s:
                due = min(due, limit_s - running_s)
            else:
                reported.add(kind)
                if self._emit.wants(kind):
                    stack = stack_of(run, self._emit.redact)
                    self._emit(kind(run, _clock.timestamp(), running_s, limit_s, stack))
        return due

    def look_safely(self) -> float:
        """`look`; an error of ours must not end the thread."""
        try:
            return self.look()
        except Exception as error:
            self._emit.broken("aftertask.hazards", "stuck runs", error)
            return LONGEST


class _WatchThread:
    """The one thread that looks, while an app needs it."""

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        self._changed = threading.Condition()
        self._watches: weakref.WeakSet[StuckWatch] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._has_news = False

    def watches(self, watch: StuckWatch) -> bool:
        """Whether this app's runs are looked at."""
        return watch in self._watches

    def watch(self, watch: StuckWatch) -> None:
        """Look at this app's runs from now on, or sooner than before."""
        on_fork(self)
        on_fork(watch)
        _clock.watchers.add(watch)
        with self._changed:
            if self._thread is None:
                self._thread = start_thread("stuck", self._run)  # may be refused
            self._watches.add(watch)
            self._wake()

    def unwatch(self, watch: StuckWatch) -> None:
        """Look at this app's runs no longer."""
        with self._changed:
            self._watches.discard(watch)
            self._wake()

    def _wake(self) -> None:
        self._has_news = True
        self._changed.notify_all()

    def _run(self) -> None:
        while watches := self._remaining():
            due = min(watch.look_safely() for watch in watches)
            del watches  # an app that is no longer used must not be kept
            with self._changed:
                if not self._has_news:
                    self._changed.wait(min(LONGEST, max(SHORTEST, due)))
                self._has_news = False

    def _remaining(self) -> list[StuckWatch]:
        with self._changed:
            watches = list(self._watches)
            if not watches:
                self._thread = None
            return watches


_THREAD = _WatchThread()
