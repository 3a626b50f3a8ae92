"""One time that an event loop does not answer: who is blamed for how long of it, and who is told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, time
from typing import Any

import anyio

from ..events import LoopBlocked, LoopListener, TaskRun
from ._stacks import Place

#: A loop that has been blocked for so many seconds is told of while it still is.
STILL_BLOCKED = 5.0

#: A task is told of in full once in so many seconds; of so many tasks this is remembered.
REPORT_EVERY = 60.0
_TASKS = 1000

Broken = Callable[[str, Exception], None]


@dataclass(frozen=True, slots=True, eq=False)
class Subscriber:
    """
    Somebody who wants to know of a loop: one app.

    Attributes:
        threshold: Seconds without an answer from which on the loop is blocked.
        listeners: Who is told.
        found: Told of each run that blocks the loop, where it is, and its stack; once a block.
        looked: Called at each look, in the watching thread, with the loop's limiter of threads.
        redact: For the stack.
        broken: Told of a listener that raised.
    """

    threshold: float
    listeners: list[LoopListener]
    found: Callable[[TaskRun, str, str], None]
    looked: Callable[[anyio.CapacityLimiter], None]
    redact: Callable[[str], str]
    broken: Broken


@dataclass(frozen=True, slots=True, eq=False)
class _Ear:
    """A listener of one subscriber or more: the least threshold counts."""

    listener: LoopListener
    threshold: float
    broken: Broken

    def tell(self, what: str, *told: Any) -> None:
        try:
            getattr(self.listener, what)(*told)
        except Exception as error:
            self.broken(f"event loop: {what}", error)


class Audience:
    """Everybody who wants to know of one loop."""

    def __init__(self) -> None:
        self.subscribers: tuple[Subscriber, ...] = ()
        self._ears: tuple[_Ear, ...] = ()
        self.threshold = 1.0

    def set(self, subscribers: tuple[Subscriber, ...]) -> None:
        """These from now on."""
        ears: dict[int, _Ear] = {}
        for one in sorted(subscribers, key=lambda each: each.threshold, reverse=True):
            ears |= {id(listener): _Ear(listener, one.threshold, one.broken) for listener in one.listeners}
        self.subscribers, self._ears = subscribers, tuple(ears.values())
        self.threshold = min((one.threshold for one in subscribers), default=1.0)

    def tell(self, what: str, *told: Any) -> None:
        """Have a method of each listener called."""
        for ear in self._ears:
            ear.tell(what, *told)

    def looked(self, limiter: anyio.CapacityLimiter) -> None:
        """Somebody looks at the loop."""
        for one in self.subscribers:
            try:
                one.looked(limiter)
            except Exception as error:
                one.broken("event loop: looked", error)

    def give_up(self, error: BaseException) -> None:
        """The loop cannot be looked at."""
        told = error if isinstance(error, Exception) else RuntimeError(f"a listener raised {error!r}")
        for one in self.subscribers:
            with contextlib.suppress(BaseException):
                one.broken("event loop: look", told)

    def ears(self, seconds: float) -> list[_Ear]:
        """The listeners for whom a loop is blocked that has not answered for so long."""
        return [ear for ear in self._ears if _is_over(ear.threshold, seconds)]

    def who_wants(self, seconds: float) -> list[Subscriber]:
        """The subscribers likewise."""
        return [one for one in self.subscribers if _is_over(one.threshold, seconds)]


class _Culprit:
    """
    A run, or None, that was on the loop while it was blocked; for how long, and where it was first seen.

    It is `found` when it was there for a while: until then its seconds are nobody's.
    """

    __slots__ = ("credited", "found", "run", "seconds", "stack", "told", "where")

    def __init__(self, place: Place, stack: str) -> None:
        self.run, self.where, self.stack = place.run, place.where(), stack
        self.seconds = self.credited = 0.0
        self.found = False
        self.told: dict[object, float] = {}


class Block:
    """
    One time that the loop does not answer.

    Args:
        due: When it was asked, in monotonic seconds.
        audience: Who is told.
    """

    def __init__(self, due: float, audience: Audience) -> None:
        self.due = self._counted = due
        self._audience = audience
        self._culprits: dict[TaskRun | None, _Culprit] = {}
        self._last: _Culprit | None = None
        self._told = False

    def see(self, place: Place, now: float, *, sure: bool) -> None:
        """
        It goes on.

        Args:
            place: What is on the loop now.
            now: Monotonic seconds.
            sure: Whether that has been there for a while already.
        """
        culprit = self._culprits.get(place.run)
        if culprit is None:
            subscribers = self._audience.subscribers
            culprit = _Culprit(place, place.stack(subscribers[0].redact) if subscribers else "")
            self._culprits[place.run] = culprit
        culprit.found = culprit.found or sure or self._last is culprit
        self._last = culprit
        self._count(now)
        if culprit.found and culprit.run is not None:
            for one in self._audience.who_wants(now - self.due):
                if one not in culprit.told:
                    culprit.told[one] = now
                    try:
                        one.found(culprit.run, culprit.where, culprit.stack)
                    except Exception as error:
                        one.broken("blocked loop", error)
        if not self._told and now - self.due >= STILL_BLOCKED:
            self._report(over=False)

    def end(self, answered: float | None) -> None:
        """The loop answers again, since a time in monotonic seconds; None where that is not known."""
        if self._last is not None:
            self._count(answered or self._counted, over=True)
            self._report(over=True)

    def _count(self, until: float, *, over: bool = False) -> None:
        culprit = self._last
        if culprit is not None and until > self._counted:
            culprit.seconds += until - self._counted
            self._counted = until
        ears = self._audience.ears(self._counted - self.due)
        for one in self._culprits.values():
            if not (one.found or over):
                continue
            run = one.run if one.found else None
            if run is not None:
                run.blocked_s += one.seconds - one.credited
                one.credited = one.seconds
            for ear in ears:
                seconds = one.seconds - one.told.get(ear, 0.0)
                if seconds > 0:
                    one.told[ear] = one.seconds
                    ear.tell("blocked_for", run, seconds)

    def _report(self, *, over: bool) -> None:
        culprit = max(self._culprits.values(), key=lambda one: (one.found, one.seconds))
        run = culprit.run if culprit.found else None
        suppressed = 0 if self._told else _budget.take(run)
        if suppressed is None:
            return
        self._told = True
        seconds = self._counted - self.due
        report = LoopBlocked(run, time(), seconds, culprit.where, culprit.stack, suppressed, over)
        for ear in self._audience.ears(seconds):
            ear.tell("blocked", report)


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


_budget = _Budget()


def start_over() -> None:
    """Forget what was told: this is another process."""
    global _budget
    _budget = _Budget()


def _is_over(threshold: float, seconds: float) -> bool:
    return seconds >= threshold - 1e-6  # differences of large numbers
