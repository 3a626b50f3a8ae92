"""Hand each event to every signal that wants it; contain the ones that raise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any, TypeAlias, cast

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

        def broken(at: int, error: Exception) -> None:
            on_error(found[at][1], kind.__name__, error)

        names: dict[str, Any] = {f"handler{at}": handler for at, (handler, _) in enumerate(found)}
        names |= {"broken": broken, "__name__": __name__}
        exec(_written_out(kind.__name__, len(found)), names)
        return cast(Callable[[TaskEvent], None], names.pop(f"tell_{kind.__name__}"))

    def _of(self, kind: type[TaskEvent]) -> Iterable[tuple[Handler, str]]:
        for signal in self.signals:
            handlers: Mapping[type[TaskEvent], Handler] | None = getattr(signal, "handlers", None)
            if handlers is None:
                yield signal, signal_name(signal)
            elif kind in handlers:
                yield handlers[kind], signal_name(signal)


@functools.cache
def _written_out(kind: str, handlers: int) -> CodeType:
    """
    A function that tells so many handlers one after the other, written out and not as a loop.

    The interpreter makes a call faster that goes to the same function each time (PEP 659). In a loop, or in one
    function for all kinds of event, it does not: of all that a task costs that is some hundredths.
    """
    lines = [f"def tell_{kind}(event):"]
    for at in range(handlers):
        lines += [" try:", f"  handler{at}(event)", " except Exception as error:", f"  broken({at}, error)"]
    return compile("\n".join(lines), __file__, "exec")


def _check(signal: object) -> None:
    if not callable(signal):
        raise TypeError(f"a signal must be callable, got {signal!r}; a class of signals has to be called: Metrics()")
    if isinstance(signal, type):
        raise TypeError(f"a signal must be an instance, got the class {signal.__qualname__}; write {signal.__name__}()")
    if inspect.iscoroutinefunction(signal) or inspect.iscoroutinefunction(type(signal).__call__):
        raise TypeError(
            f"a signal is told synchronously, and {signal_name(signal)} is async; let it put events on a queue"
        )
