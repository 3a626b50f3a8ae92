"""
Calls of a channel, each in a thread of its own: a call that hangs cannot be stopped, only left behind. And `send_test`.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from opentelemetry import context as otel

from .. import _clock
from .._core.process import start_thread
from .._text import default_redact
from ..events import Failure
from .alert import Alert
from .channel import Channel, DeliveryFailed
from .routing import Route, routes

#: OpenTelemetry's instrumentation packages make no span in a context with this key.
_SUPPRESS_SPANS = "suppress_instrumentation"


class Call:
    """
    A call of a route's channel with an alert; it starts at once.

    Args:
        finished: Called in the call's thread when it is over; `over` and `error` are set by then.
    """

    def __init__(self, route: Route, alert: Alert, finished: Callable[[], object]) -> None:
        self.alert = alert
        self.error: BaseException | None = None
        self.over = False
        self._route, self._finished = route, finished
        try:
            start_thread(f"alert-{route.name}", self._run)
        except RuntimeError:  # no thread can be started, such as at interpreter shutdown: call it here
            self._run()

    def _run(self) -> None:
        token = otel.attach(otel.set_value(_SUPPRESS_SPANS, True))
        try:
            result = self._route.channel(self.alert)
            if inspect.isawaitable(result):
                asyncio.run(_within(self._route.timeout, result))
        except BaseException as error:  # SystemExit too: it ends this call only
            self.error = error
        finally:
            otel.detach(token)
            self.over = True
            self._finished()


async def _within(timeout: float, result: Awaitable[None]) -> None:
    await asyncio.wait_for(result, timeout)


def is_explained(error: BaseException) -> bool:
    """Whether an error's own text is meant for people: it then needs neither its class nor its stack."""
    return isinstance(error, (DeliveryFailed, TimeoutError))


@dataclass(frozen=True, slots=True)
class Tested:
    """
    The result of one channel's test alert.

    Attributes:
        channel: The channel's name, as in metrics and logs.
        ok: Whether the channel accepted it. It may still not reach a person.
        seconds: How long the call took.
        error: Why it failed, in one line, redacted; None if it did not.
    """

    channel: str
    ok: bool
    seconds: float
    error: str | None


def send_test(channels: Iterable[Channel | Route | str]) -> list[Tested]:
    """
    Send a test alert to each channel, once, one after another: `send_test(settings.alerts)`.

    Raises:
        TypeError, ValueError, ImportError: One of them is not a channel, as in `Settings`.
    """
    return [_test(route) for route in routes(channels)]


def _test(route: Route) -> Tested:
    text = f"A test of the alert channel {route.name}, sent on demand. Nothing is wrong."
    started, finished = _clock.monotonic(), threading.Event()
    call = Call(route, Alert(kind="test", severity="info", message=text), finished.set)
    finished.wait(route.timeout)
    error = call.error if call.over else TimeoutError(f"{route.name} did not return within {route.timeout:.3g} s")
    return Tested(route.name, error is None, _clock.monotonic() - started, None if error is None else _one_line(error))


def _one_line(error: BaseException) -> str:
    failure = Failure(error, default_redact)
    return failure.message if is_explained(error) else f"{failure.type}: {failure.message}"
