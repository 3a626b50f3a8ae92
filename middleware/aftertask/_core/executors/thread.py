"""A function in a worker thread that can be left behind, and is tracked until it really ends."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread

from ... import _clock
from ..._taskrun import TaskRun
from ...tasks import is_async
from ..loops import CallSoon, call_soon_from_any_thread, on_trio


class ThreadCall:
    """
    One call in a worker thread, which cannot be stopped.

    Its caller may abandon it; `on_end` then runs on the event loop as soon as the thread has ended.

    Args:
        run: The run that the call belongs to; gets the identity of the thread, and when it began.
        function: What to call.
    """

    def __init__(self, run: TaskRun, function: Callable[[], object]) -> None:
        self._run, self._function = run, function
        self._lock = threading.Lock()
        self._state = "new"
        self._call_soon = call_soon_from_any_thread()
        self._on_end: Callable[[], object] | None = None

    def __call__(self) -> object:
        """Call the function; in the thread."""
        with self._lock:
            if self._state == "abandoned":  # before it began
                return None
            self._state = "running"
        self._run.thread, self._run.thread_s = threading.get_ident(), _clock.monotonic()
        try:
            return self._function()
        finally:
            with self._lock:
                abandoned, self._state = self._state == "abandoned", "ended"
            if abandoned and self._on_end is not None and not self._call_soon(self._on_end):
                self._on_end()  # the event loop is closed, so nothing else can do it

    def abandon(self, on_end: Callable[[], object]) -> bool:
        """Stop waiting for it. Returns whether it is running now and continues; only then is `on_end` called."""
        with self._lock:
            running = self._state == "running"
            if self._state != "ended":
                self._state, self._on_end = "abandoned", on_end if running else None
            return running


class OwnLoop:
    """An async function of a run, called in a thread with an event loop of its own."""

    def __init__(self, run: TaskRun, function: Callable[[], Awaitable[object]]) -> None:
        self._run, self._function = run, function
        self._backend = "trio" if on_trio() else "asyncio"
        self._scope = anyio.CancelScope()
        self._call_soon: CallSoon | None = None
        self._cancelled = False

    def __call__(self) -> object:
        """Run it to its end; in the thread."""
        return anyio.run(self._main, backend=self._backend)

    async def _main(self) -> Any:
        with self._scope:
            self._call_soon = call_soon_from_any_thread()
            if self._cancelled:
                self._scope.cancel()
            self._run.coroutine = coroutine = self._function()  # shows where it is in a report
            return await coroutine

    def cancel(self) -> None:
        """Cancel it from another thread; it ends at its next `await`."""
        self._cancelled = True
        if self._call_soon is not None:
            self._call_soon(self._scope.cancel)  # unless it has ended meanwhile


async def call_in_thread(
    run: TaskRun,
    function: functools.partial[Any],
    *,
    may_abandon: bool,
    on_abandoned: Callable[[ThreadCall], object],
) -> object:
    """
    Call a function in a worker thread; the caller holds a slot for the thread.

    Args:
        run: The run that the call belongs to.
        function: What to call; an async function gets an event loop of its own.
        may_abandon: Whether a cancellation stops waiting for the thread. Otherwise it waits for the thread, except
            where asyncio's task itself is cancelled.
        on_abandoned: Called when a cancellation is about to leave the running thread behind; it calls
            `ThreadCall.abandon`.
    """
    own_loop = OwnLoop(run, function) if is_async(function) else None
    call = ThreadCall(run, own_loop or function)
    try:
        # The slot is the limit: anyio would free an abandoned thread's token at once on asyncio.
        return await anyio.to_thread.run_sync(
            call, abandon_on_cancel=may_abandon, limiter=anyio.CapacityLimiter(math.inf)
        )
    except BaseException:
        on_abandoned(call)  # before the cancellation below: it may end at once
        if own_loop is not None:
            own_loop.cancel()
        raise
