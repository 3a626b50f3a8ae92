"""For the tests of apps that use aftertask: recorded events, waiting without sleeping, a clock that tests turn."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware

from .. import _clock, _timer
from ..events import Ended, Scheduled, TaskEvent, TaskRun
from ..middleware import AftertaskMiddleware

__all__ = ["Recorder", "VirtualClock", "recorded"]

E = TypeVar("E", bound=TaskEvent)
_ENDS: tuple[type, ...] = Ended.__args__


class Recorder:
    """
    A signal that keeps every event, and can wait until no run is in flight.

    `AftertaskMiddleware(app, signals=[recorder])`, or beside the usual ones: `signals=[*usual(settings), recorder]`.

    Attributes:
        events: Every event told so far, in order.
    """

    def __init__(self) -> None:
        self.events: list[TaskEvent] = []
        self._inflight: set[TaskRun] = set()
        self._changed = threading.Condition()

    def __call__(self, event: TaskEvent) -> None:
        """Keep an event."""
        with self._changed:
            self.events.append(event)
            if isinstance(event, Scheduled):
                self._inflight.add(event.run)
            elif isinstance(event, _ENDS):
                self._inflight.discard(event.run)
            self._changed.notify_all()

    def of(self, kind: type[E], task: str | None = None) -> list[E]:
        """The events of one kind; with `task` only those of tasks whose name is that or ends with `.{task}`."""
        with self._changed:
            return [event for event in self.events if isinstance(event, kind) and _named(event.run, task)]

    def runs(self, task: str | None = None) -> list[TaskRun]:
        """Every run scheduled so far."""
        return [event.run for event in self.of(Scheduled, task)]

    def outcomes(self) -> list[tuple[str, str]]:
        """The last part of each ended run's task name and its outcome, in the order in which they ended."""
        with self._changed:
            ended = [event for event in self.events if isinstance(event, _ENDS)]
        return [(event.run.task.rpartition(".")[2], str(event.run.outcome)) for event in ended]

    def clear(self) -> None:
        """Forget the events; runs in flight are still waited for."""
        with self._changed:
            self.events.clear()

    def wait_idle(self, timeout: float = 10.0) -> None:
        """
        Block until every scheduled run has ended; from a thread that does not run the event loop.

        Raises:
            TimeoutError: Some have not after `timeout` seconds; the message names them.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._inflight, timeout):
                raise TimeoutError(f"after {timeout} s these runs are in flight: {sorted(map(repr, self._inflight))}")

    def wait_for(self, kind: type[E], count: int = 1, timeout: float = 10.0) -> list[E]:
        """
        Block until so many events of this kind have been told, and return them; from a thread without the event loop.

        Raises:
            TimeoutError: There are fewer after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.of(kind)) >= count, timeout):
                raise TimeoutError(f"after {timeout} s {len(self.of(kind))} {kind.__name__} were told, not {count}")
            return self.of(kind)

    async def until(self, kind: type[E], count: int = 1, timeout: float = 10.0) -> list[E]:
        """The same for a test on the event loop."""
        return await anyio.to_thread.run_sync(self.wait_for, kind, count, timeout, abandon_on_cancel=True)

    async def idle(self, timeout: float = 10.0) -> None:
        """The same for a test on the event loop."""
        await anyio.to_thread.run_sync(self.wait_idle, timeout, abandon_on_cancel=True)


def _named(run: TaskRun, task: str | None) -> bool:
    return task is None or run.task == task or run.task.endswith(f".{task}")


class VirtualClock:
    """
    A clock that stands still until a test turns it; aftertask reads it while the `with` block lasts.

    Time limits, back-offs and deadlines of policies are due when `advance` reaches them, on the event loop that waits
    for them: first wait until they are set (`until_waiting`), then advance.

    Args:
        timestamp: Where it starts, in seconds since the Unix epoch.
    """

    def __init__(self, timestamp: float = 1_800_000_000.0) -> None:
        self._start = timestamp
        self._passed = 0.0
        self._timers: list[_Timer] = []
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """How many timers are set."""
        with self._changed:
            return len(self._timers)

    def advance(self, seconds: float) -> None:
        """
        Let time pass; what is due in it is done in its order, on its event loop.

        Raises:
            ValueError: `seconds` is negative: this clock does not run backwards.
        """
        if seconds < 0:
            raise ValueError(f"a virtual clock cannot go back, got {seconds!r}; make a new one to start over")
        with self._changed:
            self._passed += seconds
            due = sorted((timer for timer in self._timers if timer.at <= self._passed), key=lambda timer: timer.at)
            self._timers = [timer for timer in self._timers if timer not in due]
        for timer in due:
            timer.soon(timer.function)
        for watcher in list(_clock.watchers):
            watcher.turned()

    def wait_until_waiting(self, count: int = 1, timeout: float = 10.0) -> None:
        """
        Block until so many timers are set; from a thread that does not run the event loop.

        Raises:
            TimeoutError: There are fewer after `timeout` seconds of real time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._timers) >= count, timeout):
                raise TimeoutError(f"after {timeout} s {len(self._timers)} timers are set, not {count}")

    async def until_waiting(self, count: int = 1, timeout: float = 10.0) -> None:
        """The same for a test on the event loop."""
        await anyio.to_thread.run_sync(self.wait_until_waiting, count, timeout, abandon_on_cancel=True)

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._passed

    def timestamp(self) -> float:
        """Seconds since the Unix epoch."""
        return self._start + self._passed

    async def sleep(self, seconds: float) -> None:
        """Return once the clock has been advanced by so many seconds."""
        event = anyio.Event()
        take_back = self.call_later(seconds, event.set)
        try:
            await event.wait()
        finally:
            take_back()

    def call_later(self, seconds: float, function: Callable[[], object]) -> Callable[[], object]:
        """Have a function called on this event loop when its time has come; returns what takes that back."""
        timer = _Timer(self._passed + seconds, function, _timer.calls_soon())

        def take_back() -> None:
            with self._changed:
                self._timers = [other for other in self._timers if other is not timer]

        with self._changed:
            self._timers.append(timer)
            self._changed.notify_all()
        return take_back

    def __enter__(self) -> VirtualClock:
        self._real = _clock.monotonic, _clock.timestamp, _timer.sleep, _timer.call_later
        _clock.monotonic, _clock.timestamp = self.monotonic, self.timestamp
        _timer.sleep, _timer.call_later = self.sleep, self.call_later
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _clock.monotonic, _clock.timestamp, _timer.sleep, _timer.call_later = self._real


@dataclass(eq=False)
class _Timer:
    at: float
    function: Callable[[], object]
    soon: Callable[[Callable[[], object]], object]


@contextlib.contextmanager
def recorded(app: Starlette) -> Iterator[Recorder]:
    """
    Have the `AftertaskMiddleware` of an app tell a recorder, in the place of its signals.

    For a test of an app as it is: `with recorded(app) as events: TestClient(app).post(…)`. Its settings are its own.
    Requests are to be made inside; afterwards the app is as before.

    Raises:
        ValueError: The app has no `AftertaskMiddleware`.
    """
    recorder = Recorder()
    layers, stack = app.user_middleware, app.middleware_stack
    ours = [layer for layer in layers if isinstance(layer.cls, type) and issubclass(layer.cls, AftertaskMiddleware)]
    if not ours:
        raise ValueError(f"{app!r} has no AftertaskMiddleware; app.add_middleware(AftertaskMiddleware) comes first")
    kwargs: dict[str, Any] = {"settings": ours[-1].kwargs.get("settings"), "signals": [recorder]}
    recording = Middleware(AftertaskMiddleware, **kwargs)
    app.user_middleware = [recording if layer is ours[-1] else layer for layer in layers]
    app.middleware_stack = None
    try:
        yield recorder
    finally:
        app.user_middleware, app.middleware_stack = layers, stack
