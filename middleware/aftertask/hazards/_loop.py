"""
An event loop, watched: how late it is, and which run is on it when it does not answer.

One thread of the process (`_watcher`) looks at each loop some times a second, and sees what its thread does. A loop
that waits for something to happen is alive, and sleeps on; any other is asked for a sign of life, and when that takes
`block_threshold`, the thread's stack says which run is on it. So an idle process wakes one thread, which finds that
the other waits: that is the cheapest that could be found.

Real time throughout: a clock that tests turn says nothing of a loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from contextvars import Context
from time import monotonic, process_time, sleep
from typing import Any

import anyio
import anyio.to_thread

from ..events import TaskRun
from ._blocks import Audience, Block, Subscriber
from ._cpu import clock_of_this_thread, is_fine
from ._stacks import Caller, place_of, rests

#: From one look to the next, as a share of the threshold: a run that blocks for 1 + 0.55 times the threshold is always
#: found, with the default that is 0.39 s. So many seconds at least, and at most.
SHARE = 0.55
SHORTEST, LONGEST = 0.01, 0.2

#: A loop that waits is asked every so many seconds all the same: what runs on it may have no frame (C called by C).
ASK_EVERY = 10.0

#: A run is blamed when it was there at two looks, so many seconds apart: no step of a busy loop takes so long, be the
#: machine ever so busy itself.
NEXT_LOOK = 0.08

#: A loop that nobody has run for so many seconds is let go; it is watched again from its next batch on.
FORGET_AFTER = 60.0

#: The watching thread is late when it wakes so many seconds after it wanted to: it, or the machine, was kept busy.
_OVERSLEPT = 0.02

#: Woken in less than this, it knows that no other thread keeps the interpreter from the loop either.
_PROMPT = 0.003

#: What was seen of a loop that waits is told every so many looks, and the threads are looked at.
_CALM_LOOKS = 8


class Watch:
    """
    One event loop.

    Args:
        loop: asyncio's, or uvloop's; None for trio's, whose thread this is.
        subscriber: Who wants to know.

    Attributes:
        thread, clock: Who runs the loop, and his seconds of processor time.
        limiter: Its sync tasks' threads.
        ended: Nobody looks at it any more.
        alone: It is the only one that is looked at.
        asked: Since when, in monotonic seconds, an answer is waited for; None where none is.
        ask_at: When a loop that waits is asked at the latest.
    """

    def __init__(self, loop: Any, subscriber: Subscriber) -> None:
        self.loop = loop
        self.thread, self.clock = threading.get_ident(), clock_of_this_thread()
        self._fine, self._burnt = is_fine(self.clock), self.clock()
        self._asleep: float | None = None  # the processor time at which the loop was seen to wait, while it is the same
        self._context = Context()  # empty: a request's would be kept for as long as the loop lives
        self._token = None if loop is not None else sys.modules["trio"].lowlevel.current_trio_token()
        self._stop: Callable[[], object] = _nothing
        self.limiter = anyio.to_thread.current_default_thread_limiter()
        self.ended = self.alone = self._paused = self._excused = False
        self._paused_at = self.ask_at = 0.0
        self.asked: float | None = None
        self._calm: list[float] = []
        self._caller: Caller | None = None
        self._audience = Audience()
        self._block: Block | None = None
        self._suspect: tuple[float, float, TaskRun | None] | None = None
        self._late = (0.0, 0.0)
        self.join(subscriber)

    def join(self, subscriber: Subscriber) -> None:
        """One more who wants to know."""
        if subscriber not in self._audience.subscribers:
            self._set((*self._audience.subscribers, subscriber))

    def leave(self, subscriber: Subscriber) -> bool:
        """One less; whether it was the last. Call this on the loop."""
        self._set(tuple(one for one in self._audience.subscribers if one is not subscriber))
        if not self._audience.subscribers:
            self.end()
            self._stop()
        return self.ended

    def _set(self, subscribers: tuple[Subscriber, ...]) -> None:
        self._audience.set(subscribers)
        self._every = min(LONGEST, max(SHORTEST, self._audience.threshold * SHARE))

    def end(self) -> None:
        """It is watched no more; what it held may go."""
        self.ended, self.alone, self.loop, self._token, self._block, self._suspect = True, False, None, None, None, None
        self._audience.set(())

    def give_up(self, error: BaseException) -> None:
        """It cannot be looked at, which is told; the next batch starts anew."""
        audience, self._audience = self._audience, Audience()
        self.end()
        audience.give_up(error)

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
        if lag >= self._audience.threshold:
            self._late = (asked, now)
        self.asked = None
        if self.loop is not None and not isinstance(self.loop, asyncio.BaseEventLoop):
            caller = sys._getframe(1)
            self._caller = id(caller), caller.f_code
        if self.thread != threading.get_ident():
            self.thread, self.clock = threading.get_ident(), clock_of_this_thread()
            self._fine = is_fine(self.clock)
        if self._paused:  # nobody ran the loop meanwhile, so nobody waited for it
            self._paused = False
        else:
            self._audience.tell("lag", lag)

    # --- in the watching thread

    def look(self, now: float, overslept: float) -> float:
        """
        See whether the loop is alive; returns when to look again. While it is the only one and waits, this sleeps.

        Args:
            now: Monotonic seconds.
            overslept: How much later this is than was asked for.
        """
        if self.alone:
            now, overslept = self._doze(now, overslept)
        burnt = self._burn()
        if now < self.ask_at and self._is_calm(overslept, self._burnt):
            self._note(overslept)
            return now + self._every
        return self._look_about(now, overslept, burnt)

    def _doze(self, now: float, overslept: float) -> tuple[float, float]:
        """
        Sleep on while the loop does; returns when this woke, and how much later than it wanted to.

        An idle process is here nearly all the time, and all of its caches are cold at each wake-up: every call counts.
        """
        clock, every, until = self.clock, self._every, self.ask_at
        with contextlib.suppress(OSError):  # the loop's thread has ended: the next look finds that too
            while now < until and self.alone:
                burnt, before = clock(), now
                if burnt == self._asleep:
                    self._calm.append(overslept)
                elif self._is_calm(overslept, burnt):
                    self._burnt = burnt
                    self._note(overslept)
                else:
                    break
                sleep(every)
                now = monotonic()
                overslept = now - before - every
        return now, overslept

    def _is_calm(self, overslept: float, burnt: float) -> bool:
        """Whether the loop waits for something to happen, and nobody for it."""
        if burnt == self._asleep:
            return True
        self._asleep = None
        if overslept >= _PROMPT or self.asked is not None or self._block is not None or self._paused:
            return False
        calm = rests(self.thread, self._caller)
        if calm and self._fine:
            self._asleep = burnt
        return calm

    def _note(self, lag: float) -> None:
        """As late as this thread, which nobody kept from waking, the loop would have been."""
        self._calm.append(lag)
        if len(self._calm) >= _CALM_LOOKS:
            self._tell_calm()

    def _tell_calm(self) -> None:
        calm, self._calm = self._calm, []
        for lag in calm:
            self._audience.tell("lag", max(0.0, lag))
        self._audience.looked(self.limiter)

    def _look_about(self, now: float, overslept: float, burnt: float) -> float:
        """It does something, or is to be asked. Returns when to look again."""
        excused, self._excused = self._excused, False
        if self._block is not None and self._block.due != self.asked:
            self._over(self._block)
        if not self._is_run(now):
            return now + self._every
        self._tell_calm()
        asked, threshold = self.asked, self._audience.threshold
        since = now - overslept if asked is None else asked
        # Late ourselves: the loop's thread kept the interpreter to itself, which is what is to be found. Or the whole
        # process was stopped, or had no processor: that is nobody's fault, so first let the loop have its turn, once.
        # The clock must be that thread's own to tell.
        late = threshold if asked is None else threshold / 2
        held = self.clock is not process_time and overslept >= late and burnt >= 0.9 * (now - since)
        if asked is None:
            held = held and not rests(self.thread, self._caller)
            self._ask(since if held else monotonic())  # by now time may have passed
            if not held:
                return now + self._every
        if now < since + threshold:
            return self._look_early(now, since)
        if overslept > _OVERSLEPT and not (excused or self._block) and burnt < overslept / 5:
            self._excused = True
            return now + self._every / 2
        return self._look_closer(now, since, sure=held)

    def _burn(self) -> float:
        """The loop's seconds of processor time since the last look."""
        before = self._burnt
        try:
            self._burnt = self.clock()
        except OSError:  # the thread has ended
            self.clock, self._fine, self._asleep = process_time, False, None
            before = self._burnt = process_time()
        return self._burnt - before

    def _is_run(self, now: float) -> bool:
        """Whether somebody runs the loop, and is known to wait for it."""
        if self.loop is None or self.loop.is_running():
            self._paused_at, self._paused = 0.0, self._paused and self.asked is not None
            return not (self._paused or self.ended)
        if self._block is not None:
            self._over(self._block)
        # Whoever runs it next may be another thread, so it is asked then.
        self._paused, self._caller, self.ask_at = True, None, 0.0
        self._paused_at = self._paused_at or now
        if self.loop.is_closed() or now - self._paused_at > FORGET_AFTER:
            self.end()
        return False

    def _ask(self, since: float) -> None:
        """Have the loop give a sign of life."""
        self.asked, self.ask_at = since, since + ASK_EVERY
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
        return min(now + self._every, asked + self._audience.threshold)

    def _look_closer(self, now: float, asked: float, *, sure: bool) -> float:
        """It is blocked: by whom? Returns when to look again."""
        place = place_of(self.thread, self.loop)
        if place is None or self.asked != asked:  # it answered in this very moment
            return now + self._every
        if place.debugged:
            self._block = None
            self._paused = True  # until it answers
            return now + self._every
        if self._block is None:
            self._block = Block(asked, self._audience)
        self._block.see(place, now, sure=sure or self._was_there(place.run, asked, now))
        return monotonic() + NEXT_LOOK  # this look may have taken its time

    def _was_there(self, run: TaskRun | None, asked: float, now: float) -> bool:
        if self._suspect is None:
            return False
        before, at, suspect = self._suspect
        return before == asked and suspect is run and now - at >= NEXT_LOOK

    def _over(self, block: Block) -> None:
        """The loop answers again."""
        self._block = None
        due, answered = self._late
        block.end(answered if due == block.due else None)


def _nothing() -> None:
    pass
