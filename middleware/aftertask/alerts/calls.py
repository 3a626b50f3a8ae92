"""
Calls of a channel, each in a thread of its own: a call that hangs cannot be stopped, only left behind. And `send_test`.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from opentelemetry import context as otel

from .. import _clock
from .._core.process import start_thread
from .._text import default_redact
from ..events import Failure
from .alert import Alert, Channel, DeliveryFailed
from .routing import Route, routes

#: OpenTelemetry's instrumentation packages make no span in a context with this key.
_SUPPRESS_SPANS = "suppress_instrumentation"


def call(route: Route, alert: Alert) -> Future[None]:
    """Call a route's channel with an alert; it starts at once, in a thread and a context of its own."""
    future: Future[None] = Future()

    def run() -> None:
        contextvars.Context().run(_run, route, alert, future)

    try:
        start_thread(f"alert-{route.name}", run)
    except RuntimeError:  # no thread can be started, such as at interpreter shutdown: call it here
        run()
    return future


def _run(route: Route, alert: Alert, future: Future[None]) -> None:
    otel.attach(otel.set_value(_SUPPRESS_SPANS, True))
    try:
        result = route.channel(alert)
        if inspect.isawaitable(result):
            asyncio.run(asyncio.wait_for(result, route.timeout))
    except BaseException as error:  # SystemExit too: it ends this call only
        future.set_exception(error)
    else:
        future.set_result(None)


def not_in_time(route: Route) -> TimeoutError:
    """The error of a call that takes longer than the route's timeout."""
    return TimeoutError(f"{route.name} did not return within {route.timeout:.3g} s")


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
    started = _clock.monotonic()
    try:
        error = call(route, Alert(kind="test", severity="info", message=text)).exception(route.timeout)
    except TimeoutError:
        error = not_in_time(route)
    return Tested(route.name, error is None, _clock.monotonic() - started, None if error is None else _one_line(error))


def _one_line(error: BaseException) -> str:
    failure = Failure(error, default_redact)
    return failure.message if is_explained(error) else f"{failure.type}: {failure.message}"
