"""
Waiting and time limits, on asyncio and trio; tests turn the clock by replacing `sleep` and `call_later`
(`aftertask.testing.VirtualClock`).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import sys
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


class Overrun(Exception):
    """What `within` was given took longer than it may, and was cancelled for that."""


def on_trio() -> bool:
    """Whether this code runs in a task of trio's."""
    lowlevel = sys.modules.get("trio.lowlevel")
    if lowlevel is None:
        return False
    in_trio_task = getattr(lowlevel, "in_trio_task", None)  # another thread may be importing it just now
    return in_trio_task is not None and bool(in_trio_task())


def calls_soon() -> Callable[[Callable[[], object]], object]:
    """
    A function for any thread that has something called soon on the event loop of this task.

    It raises RuntimeError once that loop is closed.
    """
    if on_trio():
        run_sync_soon: Callable[[Callable[[], object]], object] = (
            sys.modules["trio"].lowlevel.current_trio_token().run_sync_soon
        )
        return run_sync_soon
    return asyncio.get_running_loop().call_soon_threadsafe


class _Alarms:
    """
    What is to be called on one of asyncio's loops, by one timer of its own for all.

    Nearly all are taken back before they are due, and the loop keeps what was cancelled until it comes by: a timer for
    each costs three times as much (make bench).
    """

    def __init__(self) -> None:
        self._set: dict[int, tuple[float, Callable[[], object]]] = {}
        self._number = itertools.count()
        self._next = math.inf

    def set(self, loop: asyncio.AbstractEventLoop, at: float, function: Callable[[], object]) -> Callable[[], object]:
        """Call it at this time of the loop's; returns what takes that back."""
        number = next(self._number)
        self._set[number] = at, function
        if at < self._next:
            self._ring(loop, at)
        return functools.partial(self._set.pop, number, None)

    def _ring(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        # A later timer is left to itself: to be able to cancel it would be to hold on to the loop.
        self._next = at
        loop.call_at(at, self._due, loop, at)

    def _due(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        if at != self._next:
            return  # one that was left to itself
        self._next = math.inf
        # The loop's clock has steps, and it calls what comes within the present one.
        now = loop.time() + _STEP
        for number in [number for number, (due, _) in self._set.items() if due <= now]:
            alarm = self._set.pop(number, None)
            if alarm is not None:  # the one before it may have taken it back
                alarm[1]()
        soonest = min((due for due, _ in self._set.values()), default=math.inf)
        if soonest < self._next:  # else one that was called has set one
            self._ring(loop, soonest)


_STEP = time.get_clock_info("monotonic").resolution

# A loop is held by what it has to do, not by us.
_alarms: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Alarms] = weakref.WeakKeyDictionary()
_last: tuple[Callable[[], asyncio.AbstractEventLoop | None], _Alarms] = (lambda: None), _Alarms()


def _alarms_of(loop: asyncio.AbstractEventLoop) -> _Alarms:
    global _last
    last, alarms = _last  # as one: another thread may have another loop
    if last() is not loop:
        alarms = _alarms.get(loop) or _alarms.setdefault(loop, _Alarms())
        _last = weakref.ref(loop), alarms
    return alarms


def real_call_later(seconds: float, function: Callable[[], object]) -> Callable[[], object]:
    """Have a function called on this event loop; returns what takes that back."""
    if not on_trio():
        loop = asyncio.get_running_loop()
        return _alarms_of(loop).set(loop, loop.time() + seconds, function)
    scope = anyio.CancelScope()

    async def later() -> None:
        with scope:
            await anyio.sleep(seconds)
            function()

    sys.modules["trio"].lowlevel.spawn_system_task(later)
    return scope.cancel


sleep: Callable[[float], Awaitable[None]] = anyio.sleep
call_later: Callable[[float, Callable[[], object]], Callable[[], object]] = real_call_later


async def within(seconds: float, call: Awaitable[T]) -> T:
    """
    What the awaited call returns or raises; it is cancelled after so many seconds.

    On asyncio it is cancelled once, as by `asyncio.timeout`, so that its `finally` may await; on trio as by a cancel
    scope. A call that ends normally all the same has ended normally.

    Raises:
        Overrun: It ended because it was cancelled by this.
    """
    if on_trio():
        with anyio.CancelScope() as scope:
            take_back = call_later(seconds, scope.cancel)
            try:
                return await call
            finally:
                take_back()
        raise Overrun
    task: asyncio.Task[Any] | None = asyncio.current_task()
    if task is None:
        raise RuntimeError("a time limit needs a running task")
    before, fired = task.cancelling(), False

    def fire() -> None:
        nonlocal fired
        fired = True
        task.cancel()

    take_back = call_later(seconds, fire)
    try:
        result = await call
    except asyncio.CancelledError as cancelled:
        if fired and task.uncancel() <= before:  # else somebody else has cancelled the task, too
            raise Overrun from cancelled
        raise
    except BaseException:
        if fired:
            task.uncancel()
        raise
    else:
        if fired:
            task.uncancel()
        return result
    finally:
        take_back()
