"""Try the channels: does what they are told arrive?"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from ._alert import Alert
from ._channel import Deliver, DeliveryFailed, Route, routes
from ._delivery import try_once
from ._groups import message_id


@dataclass(frozen=True, slots=True)
class Tested:
    """
    What became of one channel's test alert.

    Attributes:
        channel: The channel's name, as in metrics and logs.
        ok: Whether the channel took it. Whether a person sees it, only that person can say.
        seconds: How long that took.
        error: Why it did not, in a line; None where it did.
    """

    channel: str
    ok: bool
    seconds: float
    error: str | None


def send_test(channels: Iterable[Deliver | Route | str]) -> list[Tested]:
    """
    Send a test alert to each of these channels, once, one after another: `send_test(settings.alerts)`.

    Raises:
        TypeError, ValueError, ImportError: One of them is no channel, as in `Settings`.
    """
    return [_one(route) for route in routes(channels)]


def _one(route: Route) -> Tested:
    alert = Alert(
        id=message_id(),
        kind="test",
        severity="info",
        message=f"A test of the alert channel {route.name}, sent on demand. Nothing is wrong.",
        service=os.environ.get("OTEL_SERVICE_NAME"),
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    error, seconds = try_once(route, alert)
    said = None
    if error is not None:
        ours = isinstance(error, (DeliveryFailed, TimeoutError))
        said = str(error) if ours else f"{type(error).__name__}: {error}"
    return Tested(route.name, error is None, seconds, said)
