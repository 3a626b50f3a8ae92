"""
Each event loop, watched: how late it is, and which run is on it when it does not answer.

One thread of the process wakes some times a second and sees what each loop's thread does. A loop that waits for
something to happen is alive, and sleeps on; any other is asked for a sign of life, and when that takes
`block_threshold`, the thread's stack says which run is on it. So an idle process wakes one thread, which finds that
the other has used no processor time since it was seen to wait: that is the cheapest that could be found.

Real time throughout: a clock that tests turn says nothing of a loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time as clocks
from collections.abc import Callable
from contextvars import Context
from functools import partial
from time import monotonic, sleep
from typing import Any

import anyio
import anyio.to_thread

from .. import _timer
from ..events import LoopBlocked, LoopListener, TaskRun
from ._stacks import Caller, Place, place_of, rests

#: From one look to the next, as a share of the threshold: a run that blocks for 1 + 0.55 times the threshold is always
#: found, with the default that is 0.39 s. So many seconds at least, and at most.
SHARE = 0.55
SHORTEST, LONGEST = 0.01, 0.2

#: A loop that waits is asked every so many seconds all the same: what runs on it may have no frame (C called by C).
ASK_EVERY = 10.0

#: A run is blamed when it was there at two looks, so many seconds apart: no step of a busy loop takes so long, be the
#: machine ever so busy itself.
NEXT_LOOK = 0.08

#: A loop that has been blocked for so many seconds is told of while it still is.
STILL_BLOCKED = 5.0

#: A task is told of in full once in so many seconds; of so many tasks this is remembered.
REPORT_EVERY = 60.0
_TASKS = 1000

#: A loop that nobody has run for so many seconds is let go; it is watched again from its next batch on.
FORGET_AFTER = 60.0

#: The thread ends when it has had nothing to watch for so many seconds.
LINGER = 1.0

#: The watching thread is late when it wakes so many seconds after it wanted to: it, or the machine, was kept busy.
_OVERSLEPT = 0.02

#: Woken in less than this, it knows that no other thread keeps the interpreter from the loop either.
_PROMPT = 0.003

Broken = Callable[[str, Exception], None]


class Subscriber:
    """
    Somebody who wants to know of a loop: one app.

    Args:
        threshold: Seconds without an answer from which on the loop is blocked.
        listeners: Who is told.
        found: Told of each run that blocks the loop, where it is, and its stack; once a block.
        looked: Called at each look, in the watching thread, with the loop's limiter of threads.
        redact: For the stack.
        broken: Told of a listener that raised.
    """

    def __init__(
        self,
        threshold: float,
        listeners: list[LoopListener],
        found: Callable[[TaskRun, str, str], None],
        looked: Callable[[anyio.CapacityLimiter], None],
        redact: Callable[[str], str],
        broken: Broken,
    ) -> None:
        self.threshold = threshold
        self.listeners = listeners
        self.found = found
        self.looked = looked
        self.redact = redact
        self.broken = broken


class _Culprit:
    """A run, or None, that was on the loop while it was blocked; for how long, and where it was first seen."""

    __slots__ = ("found", "run", "seconds", "stack", "told", "where")

    def __init__(self, place: Place, stack: str) -> None:
        self.run, self.where, self.stack = place.run, place.where(), stack
        self.seconds, self.found = 0.0, False
        self.told: set[Subscriber] = set()


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
        self.thread, self._clock = threading.get_ident(), _clock_of_this_thread()
        self._burnt, self._excused = self._clock(), False
        self._fine = _is_fine(self._clock)
        self._context = Context()  # empty: a request's would be kept for as long as the loop lives
        self._token = None if loop is not None else sys.modules["trio"].lowlevel.current_trio_token()
        self._stop: Callable[[], object] = _nothing
        self.limiter = anyio.to_thread.current_default_thread_limiter()
        self.ended = self.paused = False
        self._paused_at = 0.0
        self.asked: float | None = None
        self._ask_at = 0.0
        self._caller: Caller | None = None
        self._rested, self._calm = False, list[float]()
        self.subscribers: tuple[Subscriber, ...] = ()
        self._listeners: tuple[tuple[LoopListener, Broken, float], ...] = ()
        self._block: _Block | None = None
        self._suspect: tuple[float, float, TaskRun | None] | None = None
        self._late = (0.0, 0.0)
        self.join(subscriber)

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
        unique: dict[int, tuple[LoopListener, Broken, float]] = {}
        for one in sorted(subscribers, key=lambda each: each.threshold, reverse=True):  # the least threshold counts
            unique |= {id(listener): (listener, one.broken, one.threshold) for listener in one.listeners}
        self._listeners = tuple(unique.values())
        self.threshold = min((one.threshold for one in subscribers), default=1.0)
        self.every = min(LONGEST, max(SHORTEST, self.threshold * SHARE))

    def end(self) -> None:
        """It is watched no more; what it held may go."""
        self.ended, self.loop, self._token, self._block, self._suspect = True, None, None, None, None
        self.subscribers = self._listeners = ()

    def give_up(self, error: BaseException) -> None:
        """It cannot be looked at, which is told; the next batch starts anew."""
        subscribers = self.subscribers
        self.end()
        told = error if isinstance(error, Exception) else RuntimeError(f"a listener raised {error!r}")
        for one in subscribers:
            with contextlib.suppress(BaseException):
                one.broken("event loop: look", told)

    # --- on the loop

    def start(self) -> None:
        """Watch it from now on."""
        if self.loop is None:
            scope = anyio.CancelScope()
            self._stop = scope.cancel
            sys.modules["trio"].lowlevel.spawn_system_task(self._until_trio_ends, scope, context=self._context)

    async def _until_trio_ends(self, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                await anyio.sleep_forever()
        finally:
            self.end()

    def _answer(self) -> None:
        now, asked = monotonic(), self.asked
        if asked is None or self.ended:
            return
        lag = max(0.0, now - asked)
        if lag >= self.threshold:
            self._late = (asked, now)
        self.asked = None
        if self.loop is not None and not isinstance(self.loop, asyncio.BaseEventLoop):
            caller = sys._getframe(1)
            self._caller = id(caller), caller.f_code
        if self.thread != threading.get_ident():
            self.thread, self._clock = threading.get_ident(), _clock_of_this_thread()
        if self.paused:  # nobody ran the loop meanwhile, so nobody waited for it
            self.paused = False
        else:
            self._tell("lag", lag)

    # --- in the watching thread

    def look(self, now: float, overslept: float) -> float:
        """
        See whether the loop is alive; returns when to look again.

        Args:
            now: Monotonic seconds.
            overslept: How much later this is than was asked for.
        """
        before = self._burnt
        try:
            self._burnt = self._clock()
        except OSError:  # the thread has ended
            self._clock = clocks.process_time
            before = self._burnt = clocks.process_time()
            self._rested = False
        if self._fine and before == self._burnt and self._rested and now < self._ask_at:
            self._calm.append(overslept)
            return now + self.every
        burnt = self._burnt - before
        asked, block, loop = self.asked, self._block, self.loop
        excused, self._excused = self._excused, False
        if block is not None and block.due != asked:
            self._over(block)
        if loop is not None and not loop.is_running():
            if self._block is not None:
                self._over(self._block)
            # Whoever runs it next may be another thread, so it is asked then.
            self.paused, self._caller, self._ask_at = True, None, 0.0
            self._paused_at = self._paused_at or now
            if loop.is_closed() or now - self._paused_at > FORGET_AFTER:
                self.end()
        else:
            self._paused_at = 0.0
            self.paused = self.paused and asked is not None
        self._rested = False
        if self.paused or self.ended:
            return now + self.every
        self._looked()
        since = now - overslept if asked is None else asked
        # Late ourselves: the loop's thread kept the interpreter to itself, which is what is to be found. Or the whole
        # process was stopped, or had no processor: that is nobody's fault, so first let the loop have its turn, once.
        # The clock must be that thread's own to tell.
        known = self._clock is not clocks.process_time
        late = self.threshold if asked is None else self.threshold / 2
        held = known and overslept >= late and burnt >= 0.9 * (now - since)
        if asked is None:
            resting = rests(self.thread, self._caller)
            if resting and now < self._ask_at and overslept < _PROMPT:
                self._rested = True
                self._calm.append(overslept)
                return now + self.every
            held = held and not resting
            self._ask(since if held else monotonic())  # by now time may have passed
            if not held:
                return now + self.every
        if now < since + self.threshold:
            return self._look_early(now, since)
        if overslept > _OVERSLEPT and not (excused or block) and burnt < overslept / 5:
            self._excused = True
            return now + self.every / 2
        return self._look_closer(now, since, sure=held)

    def _looked(self) -> None:
        calm, self._calm = self._calm, []
        for lag in calm:  # as late as this thread, which nobody kept from waking, the loop would have been
            self._tell("lag", max(0.0, lag))
        for one in self.subscribers:
            try:
                one.looked(self.limiter)
            except Exception as error:
                one.broken("event loop: looked", error)

    def _ask(self, since: float) -> None:
        """Have the loop give a sign of life."""
        self.asked, self._ask_at = since, since + ASK_EVERY
        loop, token = self.loop, self._token
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._answer, context=self._context)
            elif token is not None:
                token.run_sync_soon(self._answer)
        except RuntimeError:  # it is closed, or trio's run is over
            self.end()

    def _look_early(self, now: float, asked: float) -> float:
        """It has not answered yet: remember who is on it. Returns when to look again."""
        place = place_of(self.thread, self.loop)
        self._suspect = None if place is None else (asked, now, place.run)
        return min(now + self.every, asked + self.threshold)

    def _look_closer(self, now: float, asked: float, *, sure: bool) -> float:
        """It is blocked: by whom? Returns when to look again."""
        place = place_of(self.thread, self.loop)
        if place is None or self.asked != asked:  # it answered in this very moment
            return now + self.every
        if place.debugged:
            self._block = None
            self.paused = True  # until it answers
            return now + self.every
        block = self._block
        if block is None:
            block = self._block = _Block(asked)
        culprit = block.culprits.get(place.run)
        if culprit is None:
            culprit = _Culprit(place, place.stack(self.subscribers[0].redact) if self.subscribers else "")
            block.culprits[place.run] = culprit
        again = sure or block.last is culprit or self._was_there(place.run, asked, now)
        block.last = culprit
        self._count(block, culprit, now)
        if again:
            self._found(culprit, now - asked)
        if not block.told and now - asked >= STILL_BLOCKED:
            self._report(block, over=False)
        return monotonic() + NEXT_LOOK  # this look may have taken its time

    def _was_there(self, run: TaskRun | None, asked: float, now: float) -> bool:
        if self._suspect is None:
            return False
        before, at, suspect = self._suspect
        return before == asked and suspect is run and now - at >= NEXT_LOOK

    def _over(self, block: _Block) -> None:
        """The loop answers again."""
        self._block = None
        due, answered = self._late
        if block.last is None:
            return
        self._count(block, block.last, answered if due == block.due else block.counted)
        self._report(block, over=True)

    def _count(self, block: _Block, culprit: _Culprit, until: float) -> None:
        seconds, before, block.counted = until - block.counted, block.counted - block.due, until
        if seconds <= 0:
            return
        culprit.seconds += seconds
        if culprit.run is not None:
            culprit.run.blocked_s += seconds
        for listener, broken, threshold in self._listeners:
            if _is_over(threshold, before):
                self._tell_one(listener, broken, "blocked_for", culprit.run, seconds)
            elif _is_over(threshold, until - block.due):  # all of it, for who did not want to know until now
                for one in block.culprits.values():
                    self._tell_one(listener, broken, "blocked_for", one.run, one.seconds)

    def _found(self, culprit: _Culprit, lasted: float) -> None:
        culprit.found = True
        if culprit.run is None:
            return
        for one in self.subscribers:
            if one not in culprit.told and _is_over(one.threshold, lasted):
                culprit.told.add(one)
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
        for listener, broken, threshold in self._listeners:
            if _is_over(threshold, seconds):
                self._tell_one(listener, broken, "blocked", report)

    def _tell(self, what: str, *told: Any) -> None:
        for listener, broken, _ in self._listeners:
            self._tell_one(listener, broken, what, *told)

    @staticmethod
    def _tell_one(listener: LoopListener, broken: Broken, what: str, *told: Any) -> None:
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
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, name="aftertask-loops", daemon=True)
                thread.start()  # may be refused; then it is tried again with the next batch
                self._thread = thread
            self._watches = {**self._watches, key: watch}
            self._changed.notify()

    def _run(self) -> None:
        while self._has_any():
            wanted = 0.0
            while watches := self._watches:
                now = monotonic()  # what the looks themselves took is nobody's fault
                wanted = max(wanted, now + 0.001)
                sleep(wanted - now)  # a third cheaper than a wait that can be ended
                now = monotonic()
                overslept, wanted = now - wanted, now + LONGEST
                for watch in watches.values():
                    try:
                        again = watch.look(now, overslept)
                    except BaseException as error:  # or no loop of the process would be watched any more
                        watch.give_up(error)
                        again = wanted
                    if again < wanted:
                        wanted = again
                    if watch.ended:
                        self._drop(watch)

    def _has_any(self) -> bool:
        """Wait for a loop for a while; False where there is none and the thread is to end."""
        with self._changed:
            if self._changed.wait_for(lambda: self._watches, LINGER):
                return True
            self._thread = None
            return False

    def _drop(self, ended: Watch) -> None:
        with self._changed:
            self._watches = {key: watch for key, watch in self._watches.items() if watch is not ended}


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


def _clock_of_this_thread() -> Callable[[], float]:
    """Tells a thread's seconds of processor time, while it lives; its process's, where threads have no clock."""
    get, thread = getattr(clocks, "pthread_getcpuclockid", None), threading.get_ident()
    if get is None or thread not in sys._current_frames():  # gevent's threads are none
        return clocks.process_time
    return partial(clocks.clock_gettime, get(thread))


def _is_fine(clock: Callable[[], float]) -> bool:
    """Whether a clock of processor time goes on with each look at it, and not by ticks: then it tells who sleeps."""
    first = clock()
    return any(clock() != first for _ in range(1000))


def _is_over(threshold: float, seconds: float) -> bool:
    return seconds >= threshold - 1e-6  # differences of large numbers


def _nothing() -> None:
    pass
