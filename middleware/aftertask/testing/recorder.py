"""A signal that records every event, and waits for events and runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware

from ..events import Ended, Scheduled, TaskEvent, TaskRun
from ..middleware import AftertaskMiddleware

E = TypeVar("E", bound=TaskEvent)
_ENDS: tuple[type, ...] = get_args(Ended)


class Recorder:
    """
    A signal that keeps every event and can wait until no run is in flight.

    Use `AftertaskMiddleware(app, signals=[recorder])`, or add it to the usual signals: `[*usual(settings), recorder]`.

    Attributes:
        events: Every event so far, in order.
    """

    def __init__(self) -> None:
        self.events: list[TaskEvent] = []
        self._in_flight: set[TaskRun] = set()
        self._changed = threading.Condition()

    def __call__(self, event: TaskEvent) -> None:
        """Record an event."""
        with self._changed:
            self.events.append(event)
            if isinstance(event, Scheduled):
                self._in_flight.add(event.run)
            elif isinstance(event, _ENDS):
                self._in_flight.discard(event.run)
            self._changed.notify_all()

    def of(self, kind: type[E], task: str | None = None) -> list[E]:
        """The events of one kind; with `task`, only those of tasks with that name, or one that ends with `.{task}`."""
        with self._changed:
            return [event for event in self.events if isinstance(event, kind) and _is_named(event.run, task)]

    def runs(self, task: str | None = None) -> list[TaskRun]:
        """Every run scheduled so far."""
        return [event.run for event in self.of(Scheduled, task)]

    def outcomes(self) -> list[tuple[str, str]]:
        """
        The task and the outcome of each ended run, in the order in which the runs ended.

        If `@task` or `Settings.policies` names the task, it has its full name, such as `mail.welcome`; otherwise only
        the name of its function.
        """
        with self._changed:
            ended = [event for event in self.events if isinstance(event, _ENDS)]
        return [(_shown(event.run), str(event.run.outcome)) for event in ended]

    def clear(self) -> None:
        """Forget the events so far; `wait_idle` still waits for runs in flight."""
        with self._changed:
            self.events.clear()

    def wait_idle(self, timeout: float = 10.0) -> None:
        """
        Block until every scheduled run has ended; call it from a thread that does not run the event loop.

        Raises:
            TimeoutError: Some runs have not ended after `timeout` seconds; the message names them.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._in_flight, timeout):
                raise TimeoutError(f"after {timeout} s these runs are in flight: {sorted(map(repr, self._in_flight))}")

    def wait_for(self, kind: type[E], count: int = 1, timeout: float = 10.0) -> list[E]:
        """
        Block until there are `count` events of this kind, and return them; call it from a thread without the loop.

        Raises:
            TimeoutError: There are fewer after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.of(kind)) >= count, timeout):
                found = len(self.of(kind))
                raise TimeoutError(f"after {timeout} s there are {found} {kind.__name__} events, expected {count}")
            return self.of(kind)

    async def until(self, kind: type[E], count: int = 1, timeout: float = 10.0) -> list[E]:
        """`wait_for`, for a test on the event loop."""
        return await anyio.to_thread.run_sync(self.wait_for, kind, count, timeout, abandon_on_cancel=True)

    async def idle(self, timeout: float = 10.0) -> None:
        """`wait_idle`, for a test on the event loop."""
        await anyio.to_thread.run_sync(self.wait_idle, timeout, abandon_on_cancel=True)


def _shown(run: TaskRun) -> str:
    return run.task if run.info.registered else run.task.rpartition(".")[2]


def _is_named(run: TaskRun, task: str | None) -> bool:
    return task is None or run.task == task or run.task.endswith(f".{task}")


@contextlib.contextmanager
def recorded(app: Starlette) -> Iterator[Recorder]:
    """
    Replace the signals of an app's `AftertaskMiddleware` with a recorder, to test the app as it is.

    `with recorded(app) as events: TestClient(app).post(…)`. The app keeps its settings. Make the requests inside the
    `with` block; afterwards the app is as before.

    Raises:
        TypeError: It is not a Starlette or FastAPI app.
        ValueError: The app has no `AftertaskMiddleware`.
    """
    if not isinstance(app, Starlette):
        raise TypeError(f"recorded() takes the Starlette or FastAPI app itself, got {app!r}; import it and pass it")
    recorder = Recorder()
    layers, stack = app.user_middleware, app.middleware_stack
    ours = [layer for layer in layers if isinstance(layer.cls, type) and issubclass(layer.cls, AftertaskMiddleware)]
    if not ours:
        raise ValueError(f"{app!r} has no AftertaskMiddleware; call app.add_middleware(AftertaskMiddleware) first")
    kwargs: dict[str, Any] = {"settings": ours[-1].kwargs.get("settings"), "signals": [recorder]}
    recording = Middleware(AftertaskMiddleware, **kwargs)
    app.user_middleware = [recording if layer is ours[-1] else layer for layer in layers]
    app.middleware_stack = None
    try:
        yield recorder
    finally:
        app.user_middleware, app.middleware_stack = layers, stack
