"""
Each event loop, watched: how late it is, and which run is on it when it does not answer.

A heartbeat on the loop says that it is alive; one thread of the process looks only when a beat is overdue by
`block_threshold`. Real time throughout: a clock that tests turn says nothing of a loop.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time as clocks
from collections.abc import Callable
from contextvars import Context
from time import monotonic
from typing import Any

import anyio
import anyio.to_thread

from .. import _timer
from .._run import _live
from ..events import LoopBlocked, LoopListener, TaskRun
from ._stacks import Place, place_of

#: From one beat to the next, as a share of the threshold: while there are runs, and while there are none, when an idle
#: process shall sleep. So many seconds at least, and at most.
BUSY, IDLE = 0.4, 0.8
SHORTEST, LONGEST = 0.01, 0.2

#: A run is blamed when it is still there at the next look, so many seconds later: no step of a busy loop takes so long.
NEXT_LOOK = 0.03

#: A loop that has been blocked for so many seconds is told of while it still is.
STILL_BLOCKED = 5.0

#: A task is told of in full once in so many seconds; of so many tasks this is remembered.
REPORT_EVERY = 60.0
_TASKS = 1000

#: The thread ends when it has had nothing to watch for so many seconds.
LINGER = 1.0

#: The watching thread is late when it wakes so many seconds after it wanted to.
_OVERSLEPT = 0.02

Broken = Callable[[str, Exception], None]


class Subscriber:
    """
    Somebody who wants to know of a loop: one app.

    Args:
        threshold: Seconds without an answer from which on the loop is blocked.
        listeners: Who is told.
        found: Told of each run that blocks the loop, where it is, and its stack; once a block.
        beat: Called with each beat, on the loop, with its limiter of threads.
        redact: For the stack.
        broken: Told of a listener that raised.
    """

    def __init__(
        self,
        threshold: float,
        listeners: list[LoopListener],
        found: Callable[[TaskRun, str, str], None],
        beat: Callable[[anyio.CapacityLimiter], None],
        redact: Callable[[str], str],
        broken: Broken,
    ) -> None:
        self.threshold = threshold
        self.listeners = listeners
        self.found = found
        self.beat = beat
        self.redact = redact
        self.broken = broken


class _Culprit:
    """A run, or None, that was on the loop while it was blocked; for how long, and where it was first seen."""

    __slots__ = ("found", "run", "seconds", "stack", "where")

    def __init__(self, place: Place, stack: str) -> None:
        self.run, self.where, self.stack = place.run, place.where(), stack
        self.seconds, self.found = 0.0, False


class _Block:
    """One time that the loop does not answer."""

    __slots__ = ("counted", "culprits", "due", "last", "told")

    def __init__(self, due: float) -> None:
        self.due = self.counted = due
        self.culprits: dict[TaskRun | None, _Culprit] = {}
        self.last: _Culprit | None = None
        self.told = False


class Watch:
    """
    One event loop.

    Args:
        loop: asyncio's, or uvloop's; None for trio's, whose thread this is.
        subscriber: Who wants to know.
    """

    def __init__(self, loop: Any, subscriber: Subscriber) -> None:
        self.loop = loop
        self.thread, self._clock = threading.get_ident(), _thread_clock()
        self._burnt, self._excused = 0.0, False
        self._context = Context()  # empty: a request's would be kept for as long as the loop lives
        self.limiter = anyio.to_thread.current_default_thread_limiter()
        self.ended = self.paused = False
        self.subscribers: tuple[Subscriber, ...] = ()
        self._listeners: tuple[tuple[LoopListener, Broken], ...] = ()
        self._block: _Block | None = None
        self._late = (0.0, 0.0)
        self._stop: Callable[[], object] = _nothing
        self.join(subscriber)
        self.due = monotonic() + self.every

    def join(self, subscriber: Subscriber) -> None:
        """One more who wants to know."""
        if subscriber not in self.subscribers:
            self._set((*self.subscribers, subscriber))

    def leave(self, subscriber: Subscriber) -> bool:
        """One less; whether it was the last. Call this on the loop."""
        self._set(tuple(one for one in self.subscribers if one is not subscriber))
        if not self.subscribers:
            self.end()
            self._stop()
        return self.ended

    def _set(self, subscribers: tuple[Subscriber, ...]) -> None:
        self.subscribers = subscribers
        unique = {id(listener): (listener, one.broken) for one in subscribers for listener in one.listeners}
        self._listeners = tuple(unique.values())
        self.threshold = min((one.threshold for one in subscribers), default=1.0)
        self._busy, self._idle = (min(LONGEST, max(SHORTEST, self.threshold * share)) for share in (BUSY, IDLE))
        self.every = self._busy

    def end(self) -> None:
        """It is watched no more; what it held may go."""
        self.ended, self.loop, self._block = True, None, None
        self.subscribers = self._listeners = ()

    # --- on the loop

    def start(self) -> None:
        """Beat from now on."""
        if self.loop is not None:
            self._beat_again()
        else:
            scope = anyio.CancelScope()
            self._stop = scope.cancel
            sys.modules["trio"].lowlevel.spawn_system_task(self._beat_on_trio, scope, context=self._context)

    async def _beat_on_trio(self, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                while True:
                    await anyio.sleep(self.every)
                    self._beat()
        finally:
            self.end()

    def _beat_on_asyncio(self) -> None:
        if not self.ended:
            self._beat()
            self._beat_again()

    def _beat_again(self) -> None:
        self._stop = self.loop.call_later(self.every, self._beat_on_asyncio, context=self._context).cancel

    def hurry(self) -> None:
        """A batch starts: from now on a run may block. On the loop."""
        if self.every > self._busy and self.loop is not None and not self.paused:
            self._stop()
            self.every = self._busy
            self.due = monotonic() + self.every
            self._beat_again()

    def _beat(self) -> None:
        now, due = monotonic(), self.due
        if self.loop is not None:
            self.every = self._busy if _live else self._idle
        self.due = now + self.every
        if self.thread != threading.get_ident():
            self.thread, self._clock = threading.get_ident(), _thread_clock()
        lag = max(0.0, now - due)
        if lag >= self.threshold:
            self._late = (due, now)
        if self.paused:  # nobody ran the loop meanwhile, so nobody waited for it
            self.paused = False
            return
        self._tell("lag", lag)
        for one in self.subscribers:
            try:
                one.beat(self.limiter)
            except Exception as error:
                one.broken("heartbeat", error)

    # --- in the watching thread

    def look(self, now: float, overslept: float) -> float:
        """
        See whether the loop is alive; returns when to look again.

        Args:
            now: Monotonic seconds.
            overslept: How much later this is than was asked for.
        """
        due, block = self.due, self._block
        before, self._burnt = self._burnt, _burnt(self._clock)
        # Late ourselves: the loop's thread kept the interpreter to itself, which is what is to be found. Or the whole
        # process was stopped, or had no processor: that is nobody's fault, so first let the loop have its turn, once.
        burnt = self._burnt - before
        held = overslept >= self.threshold / 2 and burnt >= 0.9 * (now - due)
        excused, self._excused = self._excused, False
        if block is not None and block.due != due:
            self._over(block)
        loop = self.loop
        if loop is not None and not loop.is_running():
            if self._block is not None:
                self._over(self._block)
            self.paused = True
            if loop.is_closed():
                self.end()
        if self.paused or self.ended:
            return now + min(self.threshold, 1.0)
        if now < due + self.threshold:
            return due + self.threshold
        if overslept > _OVERSLEPT and not (excused or block) and burnt < overslept / 5:
            self._excused = True
            return now + self.every / 2
        return self._look_closer(now, due, sure=held)

    def _look_closer(self, now: float, due: float, *, sure: bool) -> float:
        """It is blocked: by whom? Returns when to look again."""
        place = place_of(self.thread, self.loop)
        if place is None or self.due != due:  # it answered in this very moment
            return now + self.every
        if place.debugged:
            self._block = None
            self.paused = True  # until the next beat
            return now + self.every
        block = self._block
        if block is None:
            block = self._block = _Block(due)
        culprit = block.culprits.get(place.run)
        if culprit is None:
            culprit = _Culprit(place, place.stack(self.subscribers[0].redact) if self.subscribers else "")
            block.culprits[place.run] = culprit
        again, block.last = sure or block.last is culprit, culprit
        self._count(block, culprit, now)
        if again:
            self._found(culprit)
        if not block.told and now - due >= STILL_BLOCKED:
            self._report(block, over=False)
        return monotonic() + NEXT_LOOK  # this look may have taken its time

    def _over(self, block: _Block) -> None:
        """The loop answers again."""
        self._block = None
        due, answered = self._late
        if block.last is None:
            return
        self._count(block, block.last, answered if due == block.due else block.counted)
        self._report(block, over=True)

    def _count(self, block: _Block, culprit: _Culprit, until: float) -> None:
        seconds, block.counted = until - block.counted, until
        if seconds > 0:
            culprit.seconds += seconds
            if culprit.run is not None:
                culprit.run.blocked_s += seconds
            self._tell("blocked_for", culprit.run, seconds)

    def _found(self, culprit: _Culprit) -> None:
        if culprit.found:
            return
        culprit.found = True
        for one in self.subscribers:
            if culprit.run is not None:
                try:
                    one.found(culprit.run, culprit.where, culprit.stack)
                except Exception as error:
                    one.broken("blocked loop", error)

    def _report(self, block: _Block, *, over: bool) -> None:
        culprit = max(block.culprits.values(), key=lambda one: (one.found, one.seconds))
        run = culprit.run if culprit.found else None
        suppressed = 0 if block.told else _budget.take(run)
        if suppressed is None:
            return
        block.told = True
        seconds = block.counted - block.due
        report = LoopBlocked(run, clocks.time(), seconds, culprit.where, culprit.stack, suppressed, over)
        self._tell("blocked", report)

    def _tell(self, what: str, *told: Any) -> None:
        for listener, broken in self._listeners:
            try:
                getattr(listener, what)(*told)
            except Exception as error:
                broken(f"event loop: {what}", error)


class _Budget:
    """What was told in full of late: each task once a minute."""

    def __init__(self) -> None:
        self._tasks: dict[str | None, tuple[float, int]] = {}

    def take(self, run: TaskRun | None) -> int | None:
        """How many of this task were left out since the last one that was told; None where this one is left out too."""
        task, now = None if run is None else run.task, monotonic()
        at, suppressed = self._tasks.get(task, (-REPORT_EVERY, 0))
        if now - at < REPORT_EVERY:
            self._tasks[task] = at, suppressed + 1
            return None
        if task not in self._tasks and len(self._tasks) >= _TASKS:
            self._tasks.clear()
        self._tasks[task] = now, 0
        return suppressed


class _Watcher:
    """The process's one thread that looks after all its loops, and ends when there is none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watches: dict[int, Watch] = {}
        self._thread: threading.Thread | None = None

    def find(self, key: int, loop: Any) -> Watch | None:
        """The watch of a loop that is watched already."""
        watch = self._watches.get(key)
        return watch if watch is not None and watch.loop is loop and not watch.ended else None

    def add(self, key: int, watch: Watch) -> None:
        """One more loop."""
        with self._changed:
            self._watches[key] = watch
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="aftertask-loops", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()

    def _run(self) -> None:
        wanted = monotonic()
        while self._wait(wanted):
            now = monotonic()
            overslept, wanted = now - wanted, now + 1.0
            for watch in list(self._watches.values()):
                wanted = min(wanted, watch.look(now, overslept))

    def _wait(self, until: float) -> bool:
        """Sleep until then, or until there is another loop; False where there is none left and the thread is to end."""
        with self._changed:
            for key in [key for key, watch in self._watches.items() if watch.ended]:
                del self._watches[key]
            if self._watches:
                self._changed.wait(max(0.001, until - monotonic()))
            elif not self._changed.wait_for(lambda: self._watches, LINGER):
                self._thread = None
                return False
            return True


_watcher, _budget = _Watcher(), _Budget()


def _start_over() -> None:
    """A fork leaves the thread behind, and the loops are the parent's."""
    global _watcher, _budget
    _watcher, _budget = _Watcher(), _Budget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over)


def this_loop() -> tuple[int, Any]:
    """A key for the event loop that runs here, and the loop; None for that on trio."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return id(loop), loop
    if _timer.on_trio():
        return id(sys.modules["trio"].lowlevel.current_trio_token()), None
    return 0, None


def watch(subscriber: Subscriber) -> Watch | None:
    """Watch the event loop that runs here for this subscriber; None where none does."""
    key, loop = this_loop()
    if not key:
        return None
    found = _watcher.find(key, loop)
    if found is None:
        found = Watch(loop, subscriber)
        found.start()
        _watcher.add(key, found)
    found.join(subscriber)
    return found


def is_here(watch: Watch) -> bool:
    """Whether this is the event loop that runs here."""
    loop = asyncio._get_running_loop()
    return watch.loop is loop if loop is not None else _watcher.find(*this_loop()) is watch


def unwatch(subscriber: Subscriber) -> None:
    """Watch the event loop that runs here no more for this subscriber."""
    found = _watcher.find(*this_loop())
    if found is not None:
        found.leave(subscriber)


def _thread_clock() -> int | None:
    """The clock of this thread's processor time; None where the system has none."""
    get = getattr(clocks, "pthread_getcpuclockid", None)
    return None if get is None else get(threading.get_ident())


def _burnt(clock: int | None) -> float:
    """Seconds of processor time of a thread; of the process, where threads have no clock or this one has ended."""
    try:
        return clocks.process_time() if clock is None else clocks.clock_gettime(clock)
    except OSError:
        return clocks.process_time()


def _nothing() -> None:
    pass
