"""Which event loop this code runs on, asyncio's or trio's, calls to it from other threads, and who cancels."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import anyio

#: Calls a function soon on one event loop, from any thread; returns False once that loop is closed.
CallSoon: TypeAlias = Callable[[Callable[[], object]], bool]


def on_trio() -> bool:
    """Whether this code runs in a task of trio."""
    # Not imported: an app that does not use trio does not have it. Another thread may be importing it at this moment.
    in_trio_task = getattr(sys.modules.get("trio.lowlevel"), "in_trio_task", None)
    return in_trio_task is not None and bool(in_trio_task())


def this_loop() -> Any:
    """What identifies the event loop that runs here: asyncio's loop, or the token of trio's run."""
    return sys.modules["trio.lowlevel"].current_trio_token() if on_trio() else asyncio.get_running_loop()


def call_soon_from_any_thread() -> CallSoon:
    """
    A `CallSoon` for the event loop of this task.

    Raises:
        RuntimeError: No event loop runs in this thread.
    """
    loop = this_loop()
    call_on_loop = loop.run_sync_soon if on_trio() else loop.call_soon_threadsafe

    def call_soon(function: Callable[[], object]) -> bool:
        try:
            call_on_loop(function)
        except RuntimeError:  # asyncio's loop is closed, or trio's run is over
            return False
        return True

    return call_soon


def cancelled_from_outside(error: BaseException) -> bool:
    """
    Whether an attempt was cancelled by its surroundings, rather than ended by a `BaseException` of its own.

    On asyncio a task that awaits something cancelled gets the same `CancelledError` as one that is cancelled itself;
    only the latter's `cancelling()` counts the request.
    """
    if isinstance(error, BaseExceptionGroup):  # a nursery of trio's makes a group of its cancellations
        return all(map(cancelled_from_outside, error.exceptions))
    if isinstance(error, (GeneratorExit, KeyboardInterrupt)):
        return True
    if not isinstance(error, anyio.get_cancelled_exc_class()):
        return False
    if on_trio():
        return True
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
