"""
Waiting and time limits, on asyncio and trio; tests turn the clock by replacing `sleep` and `call_later`
(`aftertask.testing.VirtualClock`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


class Overrun(Exception):
    """What `within` was given took longer than it may, and was cancelled for that."""


def on_trio() -> bool:
    """Whether this code runs in a task of trio's."""
    # Another thread may be importing it just now.
    in_trio_task = getattr(sys.modules.get("trio.lowlevel"), "in_trio_task", None)
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


def real_call_later(seconds: float, function: Callable[[], object]) -> Callable[[], object]:
    """Have a function called on this event loop; returns what takes that back."""
    if not on_trio():
        return asyncio.get_running_loop().call_later(seconds, function).cancel
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
