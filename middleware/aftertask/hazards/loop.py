"""
The event loops of this process, watched by one thread: how late each responds, and what blocks it.

The thread asks each loop to call a function soon, a few times per second. If the call does not come, the stack of the
loop's thread shows what is on it. Real time throughout: a clock that tests advance has nothing to do with a loop.
"""

from __future__ import annotations

import asyncio
import functools
import math
import sys
import threading
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

import anyio.to_thread

from .._core.loops import on_trio
from .._core.process import on_fork, start_thread
from .._core.stacks import frames_of_thread, run_on
from .._taskrun import TaskRun, running
from .._text import package_of
from ._block import Block
from ._reports import LoopReports

#: Seconds between two questions as a share of the threshold: what blocks for 1.4 times the threshold is always found.
SHARE = 0.4
SHORTEST, LONGEST = 0.01, 0.2

#: Seconds between two looks at a loop that does not respond: no step of a busy loop takes as long.
NEXT_LOOK = 0.08

#: A loop that has not been running for this many seconds is forgotten; its next batch has it watched again.
FORGET_AFTER = 60.0

#: If the watching thread wakes this many seconds late, the process or all its other threads were stopped.
_LATE = 0.02

#: Packages in the stack of a program that a developer has stopped.
_DEBUGGERS = frozenset({"bdb", "pdb", "ipdb", "pudb", "pydevd", "_pydevd_bundle", "_pydevd_frame_eval", "debugpy"})


def this_loop() -> Any:
    """What identifies the event loop that runs here: asyncio's loop, or the token of trio's run."""
    return sys.modules["trio.lowlevel"].current_trio_token() if on_trio() else asyncio.get_running_loop()


class Watch:
    """
    One event loop; created on it.

    Attributes:
        key: What identifies the loop; None once it is no longer watched.
        apps: The apps that run on it; the first has been there longest.
        threads: The limiter of its worker threads.
    """

    def __init__(self) -> None:
        self.key = this_loop()
        self.apps: tuple[LoopReports, ...] = ()
        self.threads = anyio.to_thread.current_default_thread_limiter()
        self._thread = threading.get_ident()
        self._block: Block | None = None
        self._stopped_at: float | None = None
        self._ask_now(monotonic())

    def end(self) -> None:
        """Release the loop and the apps."""
        self.key, self.apps, self._block = None, (), None

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
            self._settle(self._responded)
            self._ask_now(now)
        elif self._is_running(now) and not self._excused:
            return self._look_closer(now)
        return now + min(LONGEST, max(SHORTEST, self._threshold * SHARE))

    @property
    def _threshold(self) -> float:
        return min((app.threshold for app in self.apps), default=math.inf)

    def _ask_now(self, now: float) -> None:
        self._asked = self._since = now
        self._responded: float | None = None
        self._excused = False
        self._ask()

    def _ask(self) -> None:
        try:
            if isinstance(self.key, asyncio.AbstractEventLoop):
                self.key.call_soon_threadsafe(self._respond)
            else:
                self.key.run_sync_soon(self._respond, idempotent=True)
        except RuntimeError:  # the loop is closed, or trio's run is over
            self.end()

    def _respond(self) -> None:
        """On the loop, which may have moved to another thread."""
        self._thread, self._responded = threading.get_ident(), monotonic()

    def _settle(self, responded: float) -> None:
        if self._block is not None:
            self._block.end(responded, self.apps)
        if not self._excused:
            for app in self.apps:
                app.lag(max(0.0, responded - self._asked))
        self._block = self._stopped_at = None

    def _is_running(self, now: float) -> bool:
        """Whether the loop runs, so that a response can be expected."""
        if not isinstance(self.key, asyncio.AbstractEventLoop):
            self._ask()  # notices that trio's run is over
            return self.key is not None
        if self.key.is_running():
            return True
        if self._block is not None:
            self._block.end(now, self.apps)
        # The response comes as soon as the loop runs again, and how late that is means nothing.
        self._excused, self._block = True, None
        self._stopped_at = self._stopped_at or now
        if self.key.is_closed() or now - self._stopped_at > FORGET_AFTER:
            self.end()
        return False

    def _look_closer(self, now: float) -> float:
        """The loop is late: see what is on its thread. Returns when to look again."""
        first_look = self._since + max(0.0, self._threshold - NEXT_LOOK)
        if now < first_look:
            return min(now + LONGEST, first_look)
        frames = frames_of_thread(self._thread)
        run = run_on(frames) or _run_of_current_task(self.key)
        if any(package_of(frame) in _DEBUGGERS for frame in frames):
            self._excused, self._block = True, None
        elif frames and self._responded is None:
            self._block = self._block or Block(self._since)
            self._block.look(run, frames, now, self.apps)
        return monotonic() + NEXT_LOOK  # the look itself takes a moment


def _run_of_current_task(loop: object) -> TaskRun | None:
    """
    The run that started asyncio's current task, by `asyncio.gather` or a task group; None on trio, and before 3.12.

    A context may have leaked (CPython #140947), so a run that does not execute is not meant.
    """
    if sys.version_info < (3, 12) or not isinstance(loop, asyncio.AbstractEventLoop):
        return None
    task = asyncio.current_task(loop)
    run = task.get_context().get(running) if isinstance(task, asyncio.Task) else None
    return run if run is not None and run.state == "running" else None


class Watcher:
    """The one thread of the process that looks at its event loops; it ends when there are none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: tuple[Watch, ...] = ()
        self._thread: threading.Thread | None = None

    def watch(self, app: LoopReports) -> Watch:
        """Watch the event loop that runs here, for this app; its methods are called in the watching thread."""
        on_fork(self)
        with self._lock:
            watch = self.find() or Watch()
            if app not in watch.apps:
                watch.apps = (*watch.apps, app)
            if self._thread is None:
                self._thread = start_thread("loops", self._run)  # may be refused; the next batch tries again
            if watch not in self._watches:
                self._watches = (*self._watches, watch)
        return watch

    def unwatch(self, app: LoopReports) -> None:
        """Watch the event loop that runs here no longer for this app."""
        watch = self.find()
        if watch is not None:
            watch.apps = tuple(each for each in watch.apps if each is not app)
            if not watch.apps:
                watch.end()

    def find(self) -> Watch | None:
        """The watch of the event loop that runs here."""
        key = this_loop()
        return next((watch for watch in self._watches if watch.key is key), None)

    def find_for(self, app: LoopReports) -> Watch | None:
        """A watch of this app, from any thread."""
        return next((watch for watch in self._watches if app in watch.apps), None)

    def after_fork(self) -> None:
        """The thread and the loops are the parent's."""
        for watch in self._watches:
            watch.end()
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
