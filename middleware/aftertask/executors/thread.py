"""A function in a thread: one that can be left behind, and that is counted until it really ends."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread

from .. import _timer
from ..events import TaskRun
from ..policies import is_async


class ThreadCall:
    """
    One call in a worker thread, which nobody can stop.

    Whoever waits for it may leave it behind; then `at_end` is called when the thread has come to its end.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._state = "new"
        self._soon = _timer.calls_soon()
        self._at_end: list[Callable[[], object]] = []

    def __call__(self) -> Any:
        """In the thread."""
        with self._lock:
            if self._state == "left":  # before it had begun
                return None
            self._state = "running"
        try:
            return self._call()
        finally:
            with self._lock:
                left, self._state = self._state == "left", "ended"
            if left:
                self._soon_or_now(self._ended)

    def leave(self) -> bool:
        """Nobody waits for it any more; True where the function is running now, and goes on."""
        with self._lock:
            running = self._state == "running"
            if self._state != "ended":
                self._state = "left"
            return running

    def at_end(self, function: Callable[[], object]) -> None:
        """Have something called on the event loop when a call that was left behind has ended; at once if it has."""
        with self._lock:
            if self._state != "ended":
                self._at_end.append(function)
                return
        function()

    def _soon_or_now(self, function: Callable[[], object]) -> None:
        try:
            self._soon(function)
        except RuntimeError:  # the event loop is closed: nobody else is left to do it
            function()

    def _ended(self) -> None:
        with self._lock:
            functions, self._at_end = self._at_end, []
        for function in functions:
            function()


class OwnLoop:
    """An async function, called in a thread with an event loop of its own."""

    def __init__(self, call: Callable[[], Awaitable[Any]]) -> None:
        self._call = call
        self._backend = "trio" if _timer.on_trio() else "asyncio"
        self._scope = anyio.CancelScope()
        self._soon: Callable[[Callable[[], object]], object] | None = None
        self._cancelled = False

    def __call__(self) -> Any:
        """In the thread."""
        return anyio.run(self._main, backend=self._backend)

    async def _main(self) -> Any:
        with self._scope:
            self._soon = _timer.calls_soon()
            if self._cancelled:
                self._scope.cancel()
            return await self._call()

    def cancel(self) -> None:
        """Cancel it, from another thread; it ends if it comes to an `await`."""
        self._cancelled = True
        if self._soon is not None:
            try:
                self._soon(self._scope.cancel)
            except RuntimeError:
                pass  # it has ended meanwhile


class SharedThreads:
    """The threads of this event loop that sync endpoints and other tasks share, for the numbers."""

    name = "default"

    def __init__(self) -> None:
        self._limiter = anyio.to_thread.current_default_thread_limiter()

    @property
    def size(self) -> float:
        """How many there may be."""
        return self._limiter.total_tokens

    @property
    def in_use(self) -> float:
        """How many are busy."""
        return self._limiter.borrowed_tokens

    @property
    def waiting(self) -> float:
        """How many calls wait for one."""
        return self._limiter.statistics().tasks_waiting


class SharedPlace:
    """A thread of those that sync endpoints use, anyio's 40, held until the call in it has really ended."""

    def __init__(self) -> None:
        self._limiter = anyio.to_thread.current_default_thread_limiter()
        self._inside = False

    def enter_now(self) -> bool:
        """Take one, if one is free."""
        try:
            self._limiter.acquire_on_behalf_of_nowait(self)
        except anyio.WouldBlock:
            return False
        self._inside = True
        return True

    async def enter(self) -> None:
        """Wait for one."""
        await self._limiter.acquire_on_behalf_of(self)
        self._inside = True

    def again(self) -> SharedPlace:
        """Another one; this one stays taken."""
        return SharedPlace()

    def come_out(self) -> None:
        """Give it back; on the event loop."""
        if self._inside:
            self._inside = False
            self._limiter.release_on_behalf_of(self)

    give_back = come_out


class Thread:
    """
    Calls a run's function in a worker thread and does not wait for it longer than the caller does.

    Args:
        left: Told of a run, and of its call, that was left behind running.
    """

    def __init__(self, left: Callable[[TaskRun, ThreadCall], None]) -> None:
        self._left = left

    async def __call__(self, run: TaskRun) -> Any:
        """Call it; who waits for a free thread has done so before."""
        target: Any = run.target
        function = functools.partial(target.func, *target.args, **target.kwargs)
        own = OwnLoop(function) if is_async(function) else None
        call = ThreadCall(own or function)
        # With a limit alone it is waited for as by Starlette, where that can be: not where asyncio's task is cancelled.
        leave = run.plan.own_thread or run.plan.timeout is not None
        try:
            # How many run is counted by us: anyio frees a left thread's token at once on asyncio.
            return await anyio.to_thread.run_sync(
                call, abandon_on_cancel=leave, limiter=anyio.CapacityLimiter(math.inf)
            )
        except BaseException:
            left = call.leave()  # before it is cancelled: it may end at once
            if own is not None:
                own.cancel()
            if left:
                self._left(run, call)
            raise
