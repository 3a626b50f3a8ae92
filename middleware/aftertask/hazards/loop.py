"""
The event loops of this process, watched by one thread: how late each responds, and what blocks it.

The thread asks each loop to call a function soon, a few times per second. If the call does not come, the stack of the
loop's thread shows what is on it. Real time throughout: a clock that tests advance has nothing to do with a loop.
"""

from __future__ import annotations

import asyncio
import math
import threading
from time import monotonic, sleep
from typing import Any

import anyio.to_thread

from .._core.loops import call_soon_from_any_thread, this_loop
from .._core.process import on_fork, start_thread
from .._core.stacks import frames_of_thread, run_of_current_task, run_on
from .._text import package_of
from ._block import Block, LoopReports

#: Seconds between two questions as a share of the threshold: what blocks for 1.4 times the threshold is always found.
SHARE = 0.4
SHORTEST, LONGEST = 0.01, 0.2

#: Seconds between two looks at a loop that does not respond: no step of a busy loop takes as long.
NEXT_LOOK = 0.08

#: If the watching thread wakes this many seconds late, the process or all its other threads were stopped.
_LATE = 0.02

#: Packages in the stack of a program that a developer has stopped.
_DEBUGGERS = frozenset({"bdb", "pdb", "ipdb", "pudb", "pydevd", "_pydevd_bundle", "_pydevd_frame_eval", "debugpy"})


class Watch:
    """
    One event loop; created on it.

    Attributes:
        key: What identifies the loop; None once it is no longer watched.
        apps: The apps that run on it.
        thread: Identity of the thread that it runs in, which may change.
    """

    def __init__(self, key: Any) -> None:
        self.key = key
        self.apps: tuple[LoopReports, ...] = ()
        self._threads = anyio.to_thread.current_default_thread_limiter()
        self._call_soon = call_soon_from_any_thread()
        self.thread = threading.get_ident()
        self._blocks: list[Block] = []
        self._since, self._is_debugged = 0.0, False
        self._ask_now(monotonic())

    def end(self) -> None:
        """Watch this loop no longer."""
        self.key, self.apps, self._blocks = None, (), []

    def look(self, now: float, late: float) -> float:
        """
        See whether the loop has responded; returns when to look again.

        Args:
            now: Monotonic seconds.
            late: Seconds by which the watching thread woke too late: the loop may have been kept from running, too.
        """
        if late > _LATE:
            self._since = min(now, self._since + late)
        if self._responded is not None:
            self._end_blocks(self._responded)
            if not self._is_debugged:
                for app in self.apps:
                    app.lag(self._responded - self._asked, self._threads)
            self._ask_now(now)
        elif not self._is_running():
            self._end_blocks(now)
            self.end()  # watched again from the next batch on, if the server runs no lifespan
        elif not self._is_debugged:
            return self._look_closer(now)
        return now + min(LONGEST, max(SHORTEST, self._threshold * SHARE))

    @property
    def _threshold(self) -> float:
        return min((app.threshold for app in self.apps), default=math.inf)

    def _ask_now(self, now: float) -> None:
        self._asked = self._since = now
        self._responded: float | None = None
        self._is_debugged = False
        self._ask()

    def _ask(self) -> None:
        if not self._call_soon(self._respond):  # the loop is closed
            self.end()

    def _respond(self) -> None:
        """On the loop."""
        self.thread, self._responded = threading.get_ident(), monotonic()

    def _end_blocks(self, at: float) -> None:
        for block in self._blocks:
            block.end(at)
        self._blocks = []

    def _is_running(self) -> bool:
        """Whether the loop runs, so that a response can be expected."""
        if isinstance(self.key, asyncio.AbstractEventLoop):
            return self.key.is_running()
        self._ask()  # notices that trio's run is over
        return self.key is not None

    def _look_closer(self, now: float) -> float:
        """The loop is late: see what is on its thread. Returns when to look again."""
        first_look = self._since + max(0.0, self._threshold - 2 * NEXT_LOOK)  # one of three may come too late
        if now < first_look:
            return min(now + LONGEST, first_look)
        frames = frames_of_thread(self.thread)
        run = run_on(frames) or run_of_current_task(self.key)
        if any(package_of(frame) in _DEBUGGERS for frame in frames):
            self._is_debugged, self._blocks = True, []
        elif frames and self._responded is None:
            apps, watched = self.apps, [block.app for block in self._blocks]
            since = now if watched else self._since  # an app that comes later blames nothing before
            self._blocks += [Block(app, since) for app in apps if app not in watched]
            for block in self._blocks:
                block.look(run, frames, now, apps)
        return monotonic() + NEXT_LOOK  # the look itself takes a moment


class Watcher:
    """The one thread of the process that looks at its event loops; it ends when there are none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: tuple[Watch, ...] = ()
        self._thread: threading.Thread | None = None

    def watch(self, app: LoopReports) -> None:
        """Watch the event loop that runs here, for this app; its methods are called in the watching thread."""
        key = this_loop()
        with self._lock:
            if self._thread is None:
                on_fork(self)
                self._thread = start_thread("loops", self._run)  # may be refused
            watch = next((each for each in self._watches if each.key is key), None)
            if watch is None:
                watch = Watch(key)
                self._watches = (*self._watches, watch)
            watch.thread = threading.get_ident()
            if app not in watch.apps:
                watch.apps = (*watch.apps, app)

    def unwatch(self, app: LoopReports) -> None:
        """Watch no event loop for this app."""
        with self._lock:
            for watch in self._watches:
                watch.apps = tuple(each for each in watch.apps if each is not app)
                if not watch.apps:
                    watch.end()

    def after_fork(self) -> None:
        """The thread and the loops are the parent's."""
        self._lock, self._watches, self._thread = threading.Lock(), (), None

    def _run(self) -> None:
        due = monotonic()
        while watches := self._remaining():
            sleep(max(0.001, due - monotonic()))
            now = monotonic()
            due = min(_look(watch, now, now - due) for watch in watches)

    def _remaining(self) -> tuple[Watch, ...]:
        with self._lock:
            self._watches = tuple(watch for watch in self._watches if watch.key is not None)
            if not self._watches:
                self._thread = None
            return self._watches


def _look(watch: Watch, now: float, late: float) -> float:
    """Look at one loop; one that cannot be looked at is no longer watched, or no other would be either."""
    try:
        return watch.look(now, late)
    except BaseException as error:
        apps = watch.apps
        watch.end()
        for app in apps:
            app.broken(error)
        return now + LONGEST


WATCHER = Watcher()
