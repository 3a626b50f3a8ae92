"""A clock that stands still until a test advances it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

import anyio
import anyio.to_thread

from .. import _clock
from .._core.loops import CallSoon, call_soon_from_any_thread


class VirtualClock:
    """
    A clock that stands still until a test advances it; aftertask reads it within the `with` block.

    Timeouts, back-offs and deadlines of policies are due when `advance` reaches them, on the event loop that waits for
    them. First wait until they are set (`until_waiting`), then advance.

    Args:
        timestamp: The start, in seconds since the Unix epoch.
    """

    def __init__(self, timestamp: float = 1_800_000_000.0) -> None:
        self._start = timestamp
        self._passed = 0.0
        self._timers: list[_Timer] = []
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """Number of timers that are set."""
        with self._changed:
            return len(self._timers)

    def advance(self, seconds: float) -> None:
        """
        Let time pass; timers that are due fire in order, each on its event loop.

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"a virtual clock cannot go back, got {seconds!r}; create a new one to start over")
        with self._changed:
            self._passed += seconds
            due = sorted((timer for timer in self._timers if timer.at <= self._passed), key=lambda timer: timer.at)
            self._timers = [timer for timer in self._timers if timer not in due]
        for timer in due:
            timer.call_soon(timer.function)
        for watcher in list(_clock.watchers):
            watcher.clock_advanced()

    def wait_until_waiting(self, count: int = 1, timeout: float = 10.0) -> None:
        """
        Block until `count` timers are set; call it from a thread that does not run the event loop.

        Raises:
            TimeoutError: There are fewer after `timeout` seconds of real time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._timers) >= count, timeout):
                raise TimeoutError(f"after {timeout} s {len(self._timers)} timers are set, expected {count}")

    async def until_waiting(self, count: int = 1, timeout: float = 10.0) -> None:
        """`wait_until_waiting`, for a test on the event loop."""
        await anyio.to_thread.run_sync(self.wait_until_waiting, count, timeout, abandon_on_cancel=True)

    def monotonic(self) -> float:
        """Seconds since the clock was created."""
        return self._passed

    def timestamp(self) -> float:
        """Seconds since the Unix epoch."""
        return self._start + self._passed

    async def sleep(self, seconds: float) -> None:
        """Return once the clock has advanced by this many seconds."""
        event = anyio.Event()
        with self._timer(seconds, event.set):
            await event.wait()

    @contextlib.contextmanager
    def move_on_after(self, seconds: float) -> Iterator[anyio.CancelScope]:
        """A cancel scope that is cancelled once the clock has advanced by this many seconds."""
        with anyio.CancelScope() as scope, self._timer(seconds, scope.cancel):
            yield scope

    @contextlib.contextmanager
    def _timer(self, seconds: float, function: Callable[[], object]) -> Iterator[None]:
        timer = _Timer(self._passed + seconds, function, call_soon_from_any_thread())
        with self._changed:
            self._timers.append(timer)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._timers = [other for other in self._timers if other is not timer]

    def __enter__(self) -> VirtualClock:
        self._real = _clock.monotonic, _clock.timestamp, _clock.sleep, _clock.move_on_after
        _clock.monotonic, _clock.timestamp = self.monotonic, self.timestamp
        _clock.sleep, _clock.move_on_after = self.sleep, self.move_on_after  # type: ignore[assignment]  # it swallows
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _clock.monotonic, _clock.timestamp, _clock.sleep, _clock.move_on_after = self._real


@dataclass(eq=False)
class _Timer:
    at: float
    function: Callable[[], object]
    call_soon: CallSoon
