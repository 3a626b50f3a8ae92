"""For the tests of apps that use aftertask: recorded events, waiting without sleeping, a clock that tests turn."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TypeVar

import anyio.to_thread

from .. import _clock
from ..events import Ended, Scheduled, TaskEvent, TaskRun

__all__ = ["Recorder", "VirtualClock"]

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

    async def idle(self, timeout: float = 10.0) -> None:
        """The same for a test on the event loop."""
        await anyio.to_thread.run_sync(self.wait_idle, timeout, abandon_on_cancel=True)


def _named(run: TaskRun, task: str | None) -> bool:
    return task is None or run.task == task or run.task.endswith(f".{task}")


class VirtualClock:
    """
    A clock that stands still until a test turns it; aftertask reads it while the `with` block lasts.

    Args:
        timestamp: Where it starts, in seconds since the Unix epoch.
    """

    def __init__(self, timestamp: float = 1_800_000_000.0) -> None:
        self._start = timestamp
        self._passed = 0.0

    def advance(self, seconds: float) -> None:
        """
        Let time pass.

        Raises:
            ValueError: `seconds` is negative: this clock does not run backwards.
        """
        if seconds < 0:
            raise ValueError(f"a virtual clock cannot go back, got {seconds!r}; make a new one to start over")
        self._passed += seconds

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._passed

    def timestamp(self) -> float:
        """Seconds since the Unix epoch."""
        return self._start + self._passed

    def __enter__(self) -> VirtualClock:
        self._real = _clock.monotonic, _clock.timestamp
        _clock.monotonic, _clock.timestamp = self.monotonic, self.timestamp
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _clock.monotonic, _clock.timestamp = self._real
