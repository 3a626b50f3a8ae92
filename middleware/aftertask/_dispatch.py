"""Hand each event to every signal that wants it; contain the ones that raise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from .events import EVENTS, Signal, TaskEvent
from .policies import code_name as signal_name

Handler: TypeAlias = Callable[[Any], object]


class Dispatch:
    """
    The signals of one app, sorted once by the events they want.

    Args:
        signals: Who is told, in order.
        on_error: Told of a signal that raised: its name, the event, the exception.

    Raises:
        TypeError: A signal is not callable, or is a coroutine function.
    """

    def __init__(self, signals: Iterable[Signal], on_error: Callable[[str, str, Exception], None]) -> None:
        self.signals = tuple(signals)
        self._on_error = on_error
        for signal in self.signals:
            _check(signal)
        self._handlers = {kind: tuple(self._of(kind)) for kind in EVENTS}

    def to(self, kind: type[TaskEvent]) -> Callable[[TaskEvent], None] | None:
        """The way to tell this kind of event; None where nobody listens, so that it need not be built."""
        found, on_error = self._handlers[kind], self._on_error
        if not found:
            return None
        handlers = [handler for handler, _ in found]

        def tell(event: TaskEvent) -> None:
            for handler in handlers:
                try:
                    handler(event)
                except Exception as error:
                    name = next(name for each, name in found if each is handler)
                    on_error(name, type(event).__name__, error)

        return tell

    def _of(self, kind: type[TaskEvent]) -> Iterable[tuple[Handler, str]]:
        for signal in self.signals:
            handlers: Mapping[type[TaskEvent], Handler] | None = getattr(signal, "handlers", None)
            if handlers is None:
                yield signal, signal_name(signal)
            elif kind in handlers:
                yield handlers[kind], signal_name(signal)


def _check(signal: object) -> None:
    if not callable(signal):
        raise TypeError(f"a signal must be callable, got {signal!r}; a class of signals has to be called: Metrics()")
    if isinstance(signal, type):
        raise TypeError(f"a signal must be an instance, got the class {signal.__qualname__}; write {signal.__name__}()")
    if inspect.iscoroutinefunction(signal) or inspect.iscoroutinefunction(type(signal).__call__):
        raise TypeError(
            f"a signal is told synchronously, and {signal_name(signal)} is async; let it put events on a queue"
        )
