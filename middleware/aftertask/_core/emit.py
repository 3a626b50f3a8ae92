"""An event to each signal that wants it; errors of signals are contained, logged and counted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._log import log
from ..events import EVENTS, METHODS, Failure, Pool, Signal, TaskEvent, TaskInfo, TaskRun
from ..tasks import code_name

Handler = Callable[[Any], object]


class Emitter:
    """
    The signals of one app, sorted once by the events they want.

    Args:
        signals: Instances of `Signal` subclasses, or functions that take every event; called in this order.
        redact: Applied to the text of exceptions before any signal gets it.

    Raises:
        TypeError: A signal cannot be called, is a class, or is async.
    """

    def __init__(self, signals: Iterable[Signal | Callable[[TaskEvent], object]], redact: Callable[[str], str]) -> None:
        self.redact = redact
        all_signals = list(signals)
        for signal in all_signals:
            _check(signal)
        self.signals: list[Signal] = [signal for signal in all_signals if isinstance(signal, Signal)]
        self._handlers: dict[type[TaskEvent], list[tuple[str, Handler]]] = {kind: [] for kind in EVENTS}
        for signal in all_signals:
            self._connect(signal)
        self.admissions = [signal for signal in self.signals if overrides(signal, "admit")]
        self._on_batch = [signal for signal in self.signals if overrides(signal, "batch_started")]

    def _connect(self, signal: Signal | Callable[[TaskEvent], object]) -> None:
        name = code_name(signal)
        for kind in EVENTS:
            handler = _handler(signal, kind)
            if handler is not None:
                self._handlers[kind].append((name, handler))

    def add(self, signal: Signal) -> None:
        """Emit events from now on to this signal, too, such as the record of a board that was mounted late."""
        if signal not in self.signals:
            self.signals.append(signal)
            self._connect(signal)

    def wants(self, kind: type[TaskEvent]) -> bool:
        """Whether any signal wants this kind of event."""
        return bool(self._handlers[kind])

    def __call__(self, event: TaskEvent) -> None:
        """Hand the event to every signal that wants it."""
        for name, handler in self._handlers[type(event)]:
            try:
                handler(event)
            except Exception as error:
                self.broken(name, type(event).__name__, error)

    def failure(self, error: BaseException) -> Failure:
        """The exception as redacted text."""
        return Failure(error, self.redact)

    def broken(self, component: str, on: str, error: Exception, **keys: Any) -> None:
        """
        Log and count an error inside aftertask.

        Args:
            component: The signal or the part that raised.
            on: The event or the step during which it raised.
            error: What it raised.
            keys: Further keys of the line, such as the run that it is about.
        """
        failure = self.failure(error)
        log(
            "error",
            "signal.failed",
            signal=component,
            on=on,
            error_type=failure.type,
            error_message=failure.message,
            exception=failure.stack,
            exc_info=error,
            **keys,
        )
        for signal in self.signals:
            try:
                signal.self_error(component)
            except Exception:  # the metric of the error is itself broken: the log line above is what remains
                pass

    # --- occasions that are no event of a run

    def open(self) -> None:
        """The app starts."""
        self.each("open", lambda signal: signal.open())

    def close(self) -> None:
        """The app has stopped."""
        self.each("close", lambda signal: signal.close())

    def batch_started(self) -> None:
        """A batch starts on this event loop."""
        for signal in self._on_batch:
            try:
                signal.batch_started()
            except Exception as error:
                self.broken(code_name(signal), "batch_started", error)

    def task_known(self, info: TaskInfo) -> None:
        """A task was resolved."""
        self.each("task_known", lambda signal: signal.task_known(info))

    def arrived(self, run: TaskRun) -> None:
        """A run that was scheduled elsewhere goes on here."""
        self.each("arrived", lambda signal: signal.arrived(run))

    def departed(self, run: TaskRun) -> None:
        """A run goes on elsewhere."""
        self.each("departed", lambda signal: signal.departed(run))

    def engine_known(self, name: str) -> None:
        """An engine exists."""
        self.each("engine_known", lambda signal: signal.engine_known(name))

    def pool_known(self, pool: Pool, *, threads: bool) -> None:
        """A limiter or a thread pool exists."""
        self.each("pool_known", lambda signal: signal.pool_known(pool, threads=threads))

    def same_provider(self, tracer: object) -> bool:
        """Whether a signal's own spans go where those of this OpenTelemetry tracer go."""
        return any(signal.same_provider(tracer) for signal in self.signals)

    async def admit(self, runs: Sequence[TaskRun]) -> None:
        """A response starts: await every admission; one that raises fails the request."""
        for signal in self.admissions:
            await signal.admit(runs)

    def each(self, name: str, call: Callable[[Signal], object]) -> None:
        """Call a method on every signal that implements it; from any thread."""
        for signal in self.signals:
            if overrides(signal, name):
                try:
                    call(signal)
                except Exception as error:
                    self.broken(code_name(signal), name, error)


def overrides(signal: Signal, method: str) -> bool:
    """Whether a signal implements this method of `Signal` itself."""
    return getattr(type(signal), method) is not getattr(Signal, method)


def _handler(signal: Signal | Callable[[TaskEvent], object], kind: type[TaskEvent]) -> Handler | None:
    if not isinstance(signal, Signal):
        return signal
    method = METHODS[kind]
    handler: Handler | None = getattr(signal, method) if overrides(signal, method) else None
    return handler


def _check(signal: object) -> None:
    if isinstance(signal, type):
        raise TypeError(f"a signal must be an instance, got the class {signal.__qualname__}; write {signal.__name__}()")
    if isinstance(signal, Signal):
        return
    if not callable(signal):
        raise TypeError(f"a signal must be a Signal or a function that takes an event, got {signal!r}")
    if inspect.iscoroutinefunction(signal) or inspect.iscoroutinefunction(type(signal).__call__):
        raise TypeError(
            f"signals are called synchronously, but {code_name(signal)} is async; let it put the events on a queue"
        )
